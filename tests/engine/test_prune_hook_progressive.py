"""PruneHook(slim_every=...) in real Runners: the network gets smaller while its masks train."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import test_prune_hook as toy  # the toy Runner of the hook's other tests
from test_prune_hook_slim import CHECKPOINT, SGD, Losses, Residual
from toy_config import VALIDATION, tiny_config

from mmitp.engine.example import blank_example
from mmitp.engine.export import export_checkpoint
from mmitp.engine.hooks import PruneHook
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.pruning import fold_masks, mask_model, masked_layers, share_masks
from mmitp.pruning.check import counted_macs
from mmitp.pruning.progressive import sizes_of_cut

EMA = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1)


class Sizes(Hook):
    """Parameters and ratio after every iteration."""

    priority = "LOW"

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = getattr(runner.model, "module", runner.model)
        weights = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("prune_mask"))
        self.seen.append((weights, toy.hook_of(runner)._ratio()))


def run(work_dir, slim_every=1, end=5, epochs=6, **kwargs):
    """32 images in batches of 8: four iterations an epoch, and 20 in the window."""
    torch.manual_seed(3)
    losses, sizes = Losses(), Sizes()
    hook = PruneHook(target=0.4, b="auto", begin=0, end=end, min_keep=0.0, slim_at_end=True, slim_every=slim_every)
    options = dict(epochs=epochs, model=Residual(width=16, dtype=torch.float64), optim=SGD)
    extra = [losses, sizes, *kwargs.pop("extra_hooks", ())]
    runner = toy.make_runner(work_dir, hook, extra_hooks=extra, **{**options, **kwargs})
    runner.train()
    return runner, hook, losses.seen, sizes.seen


def test_the_network_gets_smaller_in_the_window_and_ends_as_the_plain_slimmed_one_does(tmp_path):
    runner, hook, losses, sizes = run(tmp_path, extra_hooks=[dict(EMA)], default_hooks=CHECKPOINT)
    parameters = [weights for weights, _ in sizes]
    changes = [i for i in range(1, 24) if parameters[i] != parameters[i - 1]]
    assert len(changes) >= 3
    assert all(i % 4 == 0 for i in changes)  # before the first iteration of an epoch
    assert parameters == sorted(parameters, reverse=True)
    assert parameters[19] < 0.7 * parameters[0]
    assert 0.38 <= hook.slimmed["ratio"] <= 0.4
    assert not masked_layers(runner.model)
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert report["params_dense"] == parameters[0]
    assert report["params_kept"] == parameters[-1] == sum(p.numel() for p in runner.model.parameters())
    assert report["macs_kept"] == hook.slimmed["macs_kept"]
    average = next(h for h in runner.hooks if hasattr(h, "ema_model")).ema_model.module
    saved = torch.load(tmp_path / "epoch_6.pth", weights_only=False)
    average.load_state_dict(saved["state_dict"])  # a checkpoint's model is the average
    assert "mask entries that were off are cut out of the network" in next(tmp_path.glob("*/*.log")).read_text()


def test_a_cut_leaves_losses_and_ratio_as_they_were(tmp_path):
    """One cut in the last iterations of the window: nothing could have come back in them."""
    _, _, expected, plain = run(tmp_path / "a", slim_every=None)
    _, _, losses, sizes = run(tmp_path / "b", slim_every=0.95)
    assert sizes[18][0] == plain[18][0]
    assert sizes[19][0] < plain[19][0]
    assert losses[:20] == pytest.approx(expected[:20], rel=1e-10)
    assert [ratio for _, ratio in sizes[:20]] == [ratio for _, ratio in plain[:20]]


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_run_resumed_in_the_window_after_a_cut_goes_on_exactly(tmp_path, epoch):
    options = dict(extra_hooks=[dict(EMA)], default_hooks=CHECKPOINT)
    _, _, losses, sizes = run(tmp_path / "a", **options)
    path = tmp_path / "a" / f"epoch_{epoch}.pth"
    saved = torch.load(path, weights_only=False)["mmitp_prune_hook"]["pruner"]
    assert (saved["cut"] is not None) == (sizes[4 * epoch - 1][0] < sizes[0][0])
    assert saved["cut"] is not None or epoch == 2
    _, hook, rest, others = run(tmp_path / "b", load_from=str(path), resume=True, seed=0, **options)
    assert rest == losses[4 * epoch :]
    assert others == sizes[4 * epoch :]
    first, second = (torch.load(tmp_path / d / "epoch_6.pth", weights_only=False) for d in "ab")
    for key in ("state_dict", "ema_state_dict"):
        for name, value in first[key].items():
            torch.testing.assert_close(second[key][name], value, rtol=0, atol=0, msg=name)
    assert hook.slimmed == first["mmitp_prune_hook"]["slimmed"]


class Twice(Residual):
    """A layer that reads a stream before and after a block, whose masks are tied within themselves."""

    def __init__(self):
        super().__init__(width=16)
        self.root = nn.Conv2d(32, 16, 1)
        fold_masks(self)
        x = torch.randn(1, 3, 8, 8)
        share_masks(mask_model(self, example_inputs=x), x)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.norm(self.stem(inputs)).relu()
        y = x + self.norm2(self.body2(self.body(x).relu()))
        x = self.fc(self.root(torch.cat([x, y], 1)).mean((2, 3)))
        return x if mode == "tensor" else dict(loss=nn.functional.cross_entropy(x, data_samples))


def test_masks_that_are_tied_within_themselves_are_so_after_a_resume(tmp_path):
    options = dict(end=3, epochs=3, default_hooks=CHECKPOINT, slim_every=0.2)
    _, _, losses, sizes = run(tmp_path / "a", model=Twice(), **options)
    path = str(tmp_path / "a" / "epoch_2.pth")
    saved = torch.load(path, weights_only=False)["mmitp_prune_hook"]["pruner"]["cut"]
    kept = saved["tied"]["root"]
    assert torch.equal(kept[len(kept) // 2 :], kept[: len(kept) // 2] + 16)
    assert kept[len(kept) // 2] > len(kept) // 2  # not the first ones of both halves
    _, _, rest, others = run(tmp_path / "b", model=Twice(), load_from=path, resume=True, **options)
    assert (rest, others) == (losses[8:], sizes[8:])
    with pytest.raises(ValueError, match="does not say which of the tied masks of 'body'"):
        sizes_of_cut(Twice(), dict(saved, tied={}))


def test_weights_from_inside_the_window_do_not_start_a_dense_run(tmp_path):
    run(tmp_path / "a", epochs=5, default_hooks=CHECKPOINT)
    with pytest.raises(ValueError, match="smaller than the dense one already: resume it"):
        run(tmp_path / "b", load_from=str(tmp_path / "a" / "epoch_4.pth"))


def test_checkpoints_from_inside_the_window_are_validated_and_slimmed_as_they_are(tmp_path):
    hook = dict(slim_at_end=True, slim_every=0.4, min_keep=0.0)  # every 4 of 10 steps
    Runner.from_cfg(tiny_config(tmp_path / "a", epochs=3, hook=hook)).train()
    path = str(tmp_path / "a" / "epoch_2.pth")
    saved = torch.load(path, weights_only=False)
    assert saved["mmitp_prune_hook"]["pruner"]["cut"] is not None
    runner = Runner.from_cfg(tiny_config(tmp_path / "b", hook=hook, load_from=path, **VALIDATION))
    runner.val()
    assert runner.model.body.weight.shape == saved["state_dict"]["body.weight"].shape != (8, 8, 3, 3)
    report = slim_checkpoint(tiny_config(tmp_path / "c", hook=hook), path, str(tmp_path / "slim"))
    small = MODELS.build(Config.fromfile(report.config).model)
    small.load_state_dict(torch.load(report.weights, weights_only=False)["state_dict"])
    assert counted_macs(small, blank_example(small, (8, 8))) == report.macs_slim < report.macs_dense
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(small.eval()(x), runner.model.eval()(x))
    export_checkpoint(tiny_config(tmp_path / "d", hook=hook), path, str(tmp_path / "net.pt"))
    torch.testing.assert_close(torch.jit.load(tmp_path / "net.pt")(x)[0], small(x))


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_slim_every_is_a_number_of_epochs_or_a_part(value):
    with pytest.raises(ValueError, match="slim_every must be a whole number"):
        PruneHook(target=0.5, slim_at_end=True, slim_every=value)


def test_slim_every_slims_on_the_way_to_slim_at_end():
    with pytest.raises(ValueError, match="slim_every needs slim_at_end=True"):
        PruneHook(target=0.5, slim_every=1)


SCRIPT = """
import json, sys
import mmitp
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from mmengine.dist import get_rank
from test_prune_hook_progressive import CHECKPOINT, EMA, run

common = dict(launcher="pytorch", env_cfg=dict(dist_cfg=dict(backend="gloo")), default_hooks=CHECKPOINT)
runner, hook, losses, sizes = run({work!r} + "/a", extra_hooks=[dict(EMA)], **common)
path = {work!r} + "/a/epoch_4.pth"
*_, rest, others = run({work!r} + "/b", extra_hooks=[dict(EMA)], load_from=path, resume=True, **common)
out = dict(losses=losses, sizes=sizes, rest=rest, others=others, wrapper=type(runner.model).__name__)
out["weights"] = [p.tolist() for p in runner.model.parameters()]
with open({work!r} + f"/rank{{get_rank()}}.json", "w") as file:
    json.dump(out, file)
"""


def test_two_processes_cut_the_same_and_resume_exactly(tmp_path, run_in_two_processes):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), work=str(tmp_path)))
    run_in_two_processes(script)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first["wrapper"] == "MMDistributedDataParallel"
    assert first["weights"] == second["weights"]
    assert first["sizes"] == second["sizes"]
    assert first["sizes"][8][0] < first["sizes"][0][0]
    for rank in (first, second):
        assert rank["rest"] == rank["losses"][-4:]  # two iterations an epoch in each of the two processes
        assert rank["others"] == rank["sizes"][-4:]
