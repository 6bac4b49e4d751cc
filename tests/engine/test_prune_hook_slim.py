"""PruneHook(slim_at_end=True) in real Runners: the small network takes over in mid-run and nothing else changes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils
from mmengine.hooks import Hook
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import test_prune_hook as toy  # the toy Runner of the hook's other tests

from mmitp.engine.hooks import PruneHook
from mmitp.pruning import masked_layers

SGD = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-3))
ADAM = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=5e-3, weight_decay=1e-3), clip_grad=dict(max_norm=0.5))
PARAMWISE = dict(SGD, paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"prune_mask": dict(lr_mult=0.5)}))
CHECKPOINT = dict(checkpoint=dict(type="CheckpointHook", interval=1))
ITERS = dict(type="IterBasedTrainLoop", max_iters=30)
COSINE = [dict(type="CosineAnnealingLR", T_max=7, by_epoch=True)]


class Residual(toy.Toy):
    """The toy with a residual block, so that there are gathers and scatters."""

    def __init__(self, width=8, dtype=torch.float32):
        super().__init__(masked=False, width=width)
        self.body2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        toy.mask_model(self, linear=True)
        self.to(dtype)
        for layer in masked_layers(self).values():
            layer.prune_mask.data = layer.prune_mask.data.float()

    def features(self, inputs):
        inputs = inputs.to(self.stem.weight.dtype)
        x = self.norm(self.stem(inputs)).relu()
        return (x + self.norm2(self.body2(self.body(x).relu()))).relu().mean((2, 3))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.fc(self.features(inputs))
        if mode == "tensor":
            return x
        if mode == "loss":
            return dict(loss=nn.functional.cross_entropy(x, data_samples))
        return list(x.argmax(1))


class Levels(Residual):
    """A layer under several names, as RTMDet's head has for the levels of its pyramid."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.levels = nn.ModuleList([self.body, self.body2])


class Head(nn.Module):
    """Wraps its own loss, as mmpretrain's MultiTaskHead does to the heads of its tasks."""

    def __init__(self, fc):
        super().__init__()
        self.fc = fc
        loss = self.loss
        self.loss = lambda *args: loss(*args)

    def loss(self, x, labels):
        return dict(loss=nn.functional.cross_entropy(self.fc(x), labels))


class Wrapped(Residual):
    """Trains by its head's wrapped loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = Head(self.fc)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        if mode == "loss":
            return self.head.loss(self.features(inputs), data_samples)
        return super().forward(inputs, data_samples, mode)


class Losses(Hook):
    """Keeps the loss of every iteration."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(outputs["loss"].item())


def run(
    work_dir,
    slim,
    dtype=torch.float32,
    epochs=7,
    begin=0,
    end=2,
    extra_hooks=(),
    make=Residual,
    by_epoch=True,
    **kwargs,
):
    """32 images in batches of 8: four iterations an epoch."""
    torch.manual_seed(3)
    losses = Losses()
    hook = PruneHook(target=0.5, b=0, begin=begin, end=end, slim_at_end=slim, by_epoch=by_epoch)
    runner = toy.make_runner(
        work_dir,
        hook,
        epochs=epochs,
        model=make(dtype=dtype),
        extra_hooks=[losses, *extra_hooks],
        **kwargs,
    )
    runner.train()
    return runner, hook, losses.seen


@pytest.mark.parametrize("optim", [SGD, ADAM, PARAMWISE], ids=["sgd", "adam-clipped", "paramwise"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_losses_after_the_freeze_follow_the_masked_continuation(tmp_path, optim, dtype, bound):
    _, _, expected = run(tmp_path / "masked", False, dtype, optim=optim, param_scheduler=COSINE)
    runner, hook, losses = run(tmp_path / "slim", True, dtype, optim=optim, param_scheduler=COSINE)
    assert len(losses) == 28
    assert losses[:8] == expected[:8]
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < bound
    assert not masked_layers(runner.model)
    assert hook.slimmed["macs_kept"] <= 0.5 * hook.slimmed["macs_dense"]
    params = {p for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
    assert params == set(runner.model.parameters())
    assert set(runner.optim_wrapper.optimizer.state) <= params


def test_a_head_that_wraps_its_loss_is_slimmed_with_the_rest(tmp_path):
    """Copies that are compared at the start took the loss of the network's own head: layers of two widths met."""
    _, _, expected = run(tmp_path / "masked", False, torch.float64, make=Wrapped)
    runner, _, losses = run(tmp_path / "slim", True, torch.float64, make=Wrapped)
    assert losses == pytest.approx(expected, rel=1e-10)
    assert runner.model.head.fc.weight.shape[1] < 8


@pytest.mark.parametrize("update_buffers", [False, True])
def test_the_averaged_copy_is_slimmed_and_averages_on(tmp_path, update_buffers):
    ema = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1, update_buffers=update_buffers)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    outputs = []
    for slim in (False, True):
        options = dict(extra_hooks=[dict(ema)], default_hooks=CHECKPOINT, optim=SGD)
        runner, *_ = run(tmp_path / str(slim), slim, torch.float64, **options)
        averaged = next(h for h in runner.hooks if hasattr(h, "ema_model")).ema_model
        assert bool(masked_layers(averaged)) is not slim
        outputs.append((runner.model.eval()(x), averaged.module.eval()(x)))
        saved = torch.load(tmp_path / str(slim) / "epoch_7.pth", weights_only=False)
        averaged.module.load_state_dict(saved["state_dict"])  # a checkpoint's model is the average
        assert torch.equal(averaged.module(x), outputs[-1][1])
    for masked, small in zip(*outputs, strict=True):
        torch.testing.assert_close(masked, small, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(*outputs[1])


@pytest.mark.parametrize("ema", [False, True])
def test_an_epoch_goes_on_with_the_small_network_where_the_window_ends_inside_it(tmp_path, ema):
    extra = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1)] if ema else []
    options = dict(begin=2, end=6, by_epoch=False, optim=SGD, param_scheduler=COSINE, default_hooks=CHECKPOINT)
    _, _, expected = run(tmp_path / "masked", False, torch.float64, extra_hooks=extra, **options)
    runner, hook, losses = run(tmp_path / "slim", True, torch.float64, extra_hooks=extra, **options)
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < 1e-10
    assert hook.slimmed is not None and len(losses) == 28
    resumed = dict(load_from=str(tmp_path / "slim" / "epoch_2.pth"), resume=True)  # two iterations behind the freeze
    again, *_ = run(tmp_path / "again", True, torch.float64, extra_hooks=extra, **options, **resumed)
    for name, value in runner.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_iteration_based_loops_slim_in_the_iteration_of_the_freeze(tmp_path):
    kwargs = dict(loop=ITERS, begin=0, end=11, optim=SGD)
    checkpoint = dict(checkpoint=dict(type="CheckpointHook", interval=11, by_epoch=False))
    _, _, expected = run(tmp_path / "masked", False, torch.float64, **kwargs)
    _, hook, losses = run(tmp_path / "slim", True, torch.float64, default_hooks=checkpoint, **kwargs)
    assert hook.slimmed is not None
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < 1e-10
    assert not any("prune" in k for k in torch.load(tmp_path / "slim/iter_11.pth", weights_only=False)["state_dict"])


def test_accumulated_gradients_are_carried_over(tmp_path):
    """The freeze comes after 11 iterations, between two that make one update."""
    optim = dict(SGD, accumulative_counts=2)
    kwargs = dict(loop=ITERS, begin=0, end=11, optim=optim)
    _, _, expected = run(tmp_path / "masked", False, torch.float64, **kwargs)
    _, _, losses = run(tmp_path / "slim", True, torch.float64, **kwargs)
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < 1e-10


@pytest.mark.parametrize(("epoch", "priority"), [(1, "NORMAL"), (2, "NORMAL"), (4, "NORMAL"), (4, "VERY_HIGH")])
def test_checkpoints_before_at_and_after_the_freeze_resume_exactly(tmp_path, epoch, priority):
    """Wherever an EMAHook stands: mmpretrain's own configs give it PruneHook's priority, and name it first."""
    ema = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1, priority=priority)
    options = dict(default_hooks=CHECKPOINT, optim=ADAM, param_scheduler=COSINE)
    _, _, losses = run(tmp_path / "a", True, extra_hooks=[dict(ema)], **options)
    path = tmp_path / "a" / f"epoch_{epoch}.pth"
    _, hook, rest = run(
        tmp_path / "b", True, extra_hooks=[dict(ema)], load_from=str(path), resume=True, seed=0, **options
    )
    assert rest == losses[4 * epoch :]
    first, second = (torch.load(tmp_path / d / "epoch_7.pth", weights_only=False) for d in "ab")
    for key in ("state_dict", "ema_state_dict"):
        for name, value in first[key].items():
            torch.testing.assert_close(second[key][name], value, rtol=0, atol=0, msg=name)
    assert first["mmitp_prune_hook"] == second["mmitp_prune_hook"]
    assert hook.slimmed is not None


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_layer_under_several_names_resumes_exactly(tmp_path, epoch):
    options = dict(default_hooks=CHECKPOINT, optim=ADAM, make=Levels)
    _, _, losses = run(tmp_path / "a", True, **options)
    path = str(tmp_path / "a" / f"epoch_{epoch}.pth")
    _, hook, rest = run(tmp_path / "b", True, load_from=path, resume=True, seed=0, **options)
    assert rest == losses[4 * epoch :]
    assert hook.slimmed is not None


def test_a_run_with_frozen_masks_may_resume_with_slimming(tmp_path):
    options = dict(default_hooks=CHECKPOINT, optim=SGD)
    _, _, losses = run(tmp_path / "a", False, torch.float64, **options)
    path = str(tmp_path / "a" / "epoch_4.pth")
    _, hook, rest = run(tmp_path / "b", True, torch.float64, load_from=path, resume=True, **options)
    assert hook.slimmed is not None
    assert max(abs(a - b) / abs(a) for a, b in zip(losses[16:], rest, strict=True)) < 1e-10


def test_a_slimmed_checkpoint_is_resumed_as_such_without_being_asked(tmp_path):
    run(tmp_path / "a", True, default_hooks=CHECKPOINT, epochs=4)
    path = str(tmp_path / "a" / "epoch_3.pth")
    runner, hook, _ = run(tmp_path / "b", False, default_hooks=CHECKPOINT, load_from=path, resume=True, epochs=5)
    assert hook.slimmed is not None
    assert not masked_layers(runner.model)


def test_weights_of_a_slimmed_network_do_not_start_a_masked_run(tmp_path):
    run(tmp_path / "a", True, default_hooks=CHECKPOINT, epochs=3)
    with pytest.raises(ValueError, match="slim/config.py"):
        run(tmp_path / "b", True, load_from=str(tmp_path / "a" / "epoch_3.pth"))


def test_figures_and_best_checkpoints_go_on(tmp_path):
    from mmengine.evaluator import BaseMetric

    class Rising(BaseMetric):
        value = 0.0

        def process(self, data_batch, data_samples):
            self.results.append(0)

        def compute_metrics(self, results):
            Rising.value += 1
            return dict(score=Rising.value)

    checkpoint = dict(
        checkpoint=dict(type="CheckpointHook", interval=1, save_best="score", rule="greater"),
        logger=dict(type="LoggerHook", interval=1),
    )
    runner, hook, _ = run(
        tmp_path, True, default_hooks=checkpoint, epochs=4,
        val_dataloader=dict(batch_size=8, dataset=toy.ToyData(), sampler=dict(type="DefaultSampler"), num_workers=0),
        val_cfg=dict(), val_evaluator=[Rising()],
    )  # fmt: skip
    assert [p.name for p in tmp_path.glob("best_*")] == ["best_score_epoch_4.pth"]
    history = runner.message_hub.get_scalar("train/ops_kept").data[0]
    assert history[-8:] == pytest.approx([hook.slimmed["macs_kept"] / hook.slimmed["macs_dense"]] * 8)
    assert history[0] == 1.0


class Auxiliary(Residual):
    """Trains a second classifier on features that the forward pass in tensor mode leaves to pruned readers."""

    def __init__(self, dtype):
        super().__init__()
        self.aux = nn.Conv2d(8, 2, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        if mode != "loss":
            return super().forward(inputs, data_samples, mode)
        seen = []
        handle = self.body.register_forward_hook(lambda module, args, out: seen.append(out))
        losses = super().forward(inputs, data_samples, mode)
        handle.remove()
        losses["loss_aux"] = nn.functional.cross_entropy(self.aux(seen[0]).mean((2, 3)), data_samples)
        return losses


def test_training_that_reads_what_slimming_removes_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="does not train the same once slimmed"):
        run(tmp_path, True, make=Auxiliary)


def test_what_cannot_be_slimmed_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="granularity 'channel'"):
        run(tmp_path, True, make=lambda dtype: toy.Toy(granularity="weight"))

    def compiled(dtype):
        model = Residual(dtype=dtype)
        model.compile()
        return model

    with pytest.raises(ValueError, match="compiled.*config's compile="):
        run(tmp_path, True, make=compiled)


def test_a_step_that_mmengine_compiled_goes_on_with_the_small_network(tmp_path):
    """As in eager mode to the last bit; of ``train_step``, which mmengine compiles, only backward is not traced."""
    counters = torch._dynamo.utils.counters
    eager = run(tmp_path / "eager", True, optim=SGD, begin=1, epochs=3)
    torch._dynamo.reset()
    counters.clear()
    compiled = run(tmp_path / "compiled", True, optim=SGD, begin=1, epochs=3, cfg=dict(compile=dict(backend="eager")))
    assert compiled[1].slimmed is not None
    assert compiled[2] == eager[2]
    for name, value in eager[0].model.state_dict().items():
        assert torch.equal(compiled[0].model.state_dict()[name], value), name
    assert counters["stats"]["unique_graphs"] >= 2  # the masked and the small one were compiled, not passed over
    assert all("backward()" in reason for reason in counters["graph_break"])


def test_an_optimizer_that_looks_at_whole_tensors_is_named(tmp_path):
    pytest.importorskip("mmpretrain")
    import mmpretrain.engine  # noqa: F401  registers it

    optim = dict(type="OptimWrapper", optimizer=dict(type="mmpretrain.Lamb", lr=0.01, weight_decay=0.01))
    _, hook, losses = run(tmp_path, True, optim=optim, epochs=4)
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "Lamb does not step elementwise" in log
    assert hook.slimmed is not None
    assert torch.tensor(losses).isfinite().all()


class Concat(Residual):
    """A side branch whose masks are the lowest, so that nobody reads it in the end: it computes nothing."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        del self.body2, self.norm2
        self.side, self.norm2 = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.merge = nn.Conv2d(12, 8, 3, padding=1)
        for layer in masked_layers(self).values():
            layer.fold()
        toy.mask_model(self, linear=True).to(dtype)
        for layer in masked_layers(self).values():
            layer.prune_mask.data = layer.prune_mask.data.float()
        self.merge.prune_mask.data[8:] = 0.01

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.norm(self.stem(inputs.to(self.stem.weight.dtype))).relu()
        x = torch.cat([self.body(x), self.norm2(self.side(x))], 1).relu()
        x = self.fc(self.merge(x).relu().mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(x, data_samples)) if mode == "loss" else x


STILL = dict(SGD, paramwise_cfg=dict(custom_keys={"prune_mask": dict(lr_mult=0.0)}))


def test_a_branch_that_nobody_reads_computes_nothing_and_training_goes_on(tmp_path):
    _, _, expected = run(tmp_path / "a", False, torch.float64, make=Concat, optim=STILL)
    runner, _, losses = run(tmp_path / "b", True, torch.float64, make=Concat, optim=STILL)
    assert runner.model.side.weight.numel() == 0
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < 1e-10


class Stop(Hook):
    def after_train_epoch(self, runner):
        runner.train_loop.stop_training = runner.epoch == 2


@pytest.mark.parametrize("slim", [False, True])
def test_training_stopped_inside_the_window_leaves_what_its_end_would_have(tmp_path, slim):
    ema = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1)
    options = dict(end=5, default_hooks=CHECKPOINT, optim=SGD)
    runner, hook, losses = run(tmp_path / "a", slim, extra_hooks=[dict(ema), Stop()], **options)
    assert len(losses) == 12
    assert hook.frozen
    assert bool(masked_layers(runner.model)) is not slim
    saved = torch.load(tmp_path / "a" / "stopped.pth", weights_only=False)
    average = next(h for h in runner.hooks if hasattr(h, "ema_model")).ema_model.module
    average.load_state_dict(saved["state_dict"])  # a checkpoint's model is the average
    assert saved["meta"]["epoch"] == 3
    assert json.loads((tmp_path / "a" / "pruning.json").read_text())["ratio"] <= 0.5
    assert "stopped.pth holds the outcome" in next((tmp_path / "a").glob("*/*.log")).read_text()
    path = str(tmp_path / "a" / "stopped.pth")
    runner, hook, rest = run(tmp_path / "b", slim, extra_hooks=[dict(ema)], load_from=path, resume=True, **options)
    assert len(rest) == 16
    assert hook.frozen
    assert bool(masked_layers(runner.model)) is not slim


SCRIPT = """
import json, sys
import mmitp
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from mmengine.dist import get_rank
from test_prune_hook_slim import CHECKPOINT, ITERS, STILL, Concat, run

common = dict(
    dtype=torch.float64, make=Concat, optim=STILL, default_hooks=CHECKPOINT,
    launcher="pytorch", env_cfg=dict(dist_cfg=dict(backend="gloo")),
    extra_hooks=[dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1)],
)
out = dict()
for name, more in dict(epochs=dict(end=4), iterations=dict(loop=ITERS, end=11)).items():
    for slim in (False, True):
        runner, hook, losses = run({work!r} + f"/{{name}}{{slim}}", slim, **common, **more)
        out[f"{{name}} {{slim}}"] = losses
    out[name + " wrapper"] = type(runner.model).__name__
    out[name + " weights"] = [p.tolist() for p in runner.model.parameters()]
path = {work!r} + "/epochsTrue/epoch_5.pth"
*_, out["resumed"] = run({work!r} + "/again", True, **common, end=4, load_from=path, resume=True)
with open({work!r} + f"/rank{{get_rank()}}.json", "w") as file:
    json.dump(out, file)
"""


def test_distributed_training_is_unwrapped_slimmed_and_wrapped_again(tmp_path, run_in_two_processes):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), work=str(tmp_path)))
    run_in_two_processes(script)
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    for name in ("epochs", "iterations"):
        assert ranks[0][f"{name} wrapper"] == "MMDistributedDataParallel"
        assert ranks[0][f"{name} weights"] == ranks[1][f"{name} weights"]
        for rank in ranks:
            pairs = zip(rank[f"{name} False"], rank[f"{name} True"], strict=True)
            assert max(abs(a - b) / abs(a) for a, b in pairs) < 1e-10
    for rank in ranks:
        assert rank["resumed"] == rank["epochs True"][-4:]  # two iterations an epoch in each of the two processes
