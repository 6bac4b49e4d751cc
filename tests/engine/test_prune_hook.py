"""PruneHook in real Runners on the CPU: a toy network, every point of the run's life."""

import itertools
import json
import math
import re
from types import SimpleNamespace

import mmengine.runner.loops
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmitp.engine.hooks import PruneHook
from mmitp.pruning import mask_model, masked_layers

RUNS = itertools.count()  # mmengine keeps loggers by the experiment's name

# Loops of iterations sleep two seconds after each pass over the data, for the sake of workers: there are none here.
mmengine.runner.loops.time = SimpleNamespace(sleep=lambda seconds: None)


class Toy(BaseModel):
    """Two convolutions on 8x8 images and a linear classifier; learns which half of the image is brighter."""

    def __init__(self, masked=True, norm=True, width=8, granularity="channel"):
        super().__init__(data_preprocessor=ToyPreprocessor())
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 2)
        if masked:
            mask_model(self, granularity)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.norm(self.stem(inputs)).relu()
        x = self.fc(self.body(x).relu().mean((2, 3)))
        if mode == "tensor":
            return x
        if mode == "loss":
            return dict(loss=nn.functional.cross_entropy(x, data_samples))
        return list(x.argmax(1))


class ToyPreprocessor(BaseDataPreprocessor):
    def forward(self, data, training=False):
        return dict(inputs=torch.stack(data["inputs"]), data_samples=torch.stack(data["label"]))


class ToyData(Dataset):
    metainfo = {}

    def __init__(self, n=32):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 3, 8, 8, generator=generator)
        self.y = (self.x[:, :, :4].mean((1, 2, 3)) > self.x[:, :, 4:].mean((1, 2, 3))).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return dict(inputs=self.x[i], label=self.y[i])


def make_runner(
    work_dir,
    hook,
    epochs=4,
    model=None,
    seed=0,
    batch=8,
    optim=None,
    extra_hooks=(),
    loop=None,
    dataset=None,
    **kwargs,
):
    torch.manual_seed(seed)
    return Runner(
        model=model or Toy(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=batch,
            dataset=dataset or ToyData(),
            sampler=dict(type="DefaultSampler", shuffle=True),
            num_workers=0,
        ),
        train_cfg=loop or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=optim or dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, weight_decay=1e-4)),
        custom_hooks=[*([hook] if hook else []), *extra_hooks],
        default_hooks=kwargs.pop("default_hooks", dict(logger=dict(type="LoggerHook", interval=1))),
        default_scope="mmengine",
        experiment_name=f"toy{next(RUNS)}",
        randomness=dict(seed=seed),
        log_level="INFO",
        **kwargs,
    )


def hook_of(runner):
    return next(h for h in runner.hooks if isinstance(h, PruneHook))


@pytest.mark.parametrize("target", [0.7, 0.4])
def test_masks_freeze_at_or_under_the_target_even_if_nothing_moved_them(tmp_path, target):
    runner = make_runner(tmp_path, dict(type="mmitp.PruneHook", target=target, b=0, begin=1, end=3))
    runner.train()
    hook = hook_of(runner)
    assert hook.frozen
    assert all(layer.mask_frozen for layer in masked_layers(runner.model).values())
    assert hook.budget.kept_macs() <= target * hook.budget.dense_macs
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert report["switched_off"] > 0
    assert report["macs_kept"] == hook.budget.kept_macs()
    # 224 parameters in the stem, 16 in the norm, 584 in the body, 18 in the classifier; each dropped input of the
    # body takes 28 + 2 + 72 with it.
    dropped = 8 - int(masked_layers(runner.model)["body"].prune_pattern.sum())
    assert (report["params_dense"], report["params_kept"]) == (842, 842 - 102 * dropped)


def test_optimizer_2_moves_masks_by_its_equation_and_only_in_the_window(tmp_path):
    """M <- M - lr (dL_task/dM + b dL_HW/dM), after Optimizer 1, which here leaves the masks alone."""
    seen = []

    class Spy(PruneHook):
        def _optimizer_2(self):
            layer = self.masks["body"]
            before, grad = layer.prune_mask.detach().clone(), layer.prune_mask.grad.clone()
            (push,) = torch.autograd.grad(self.budget.ratio(), [layer.prune_mask])
            active = self._steps_now
            super()._optimizer_2()
            seen.append((self.runner.epoch, active, before - layer.prune_mask.detach(), 0.1 * (grad + 5 * push)))

    optim = dict(
        type="OptimWrapper",
        optimizer=dict(type="SGD", lr=0.01, weight_decay=0.0),
        paramwise_cfg=dict(custom_keys={"prune_mask": dict(lr_mult=0.0)}),
    )
    make_runner(tmp_path, Spy(target=0.5, b=5.0, begin=1, end=3, lr=0.1), optim=optim).train()
    assert [epoch for epoch, active, *_ in seen if active] == [1] * 4 + [2] * 4
    for _, active, moved, expected in seen:
        torch.testing.assert_close(moved, expected if active else torch.zeros_like(moved), atol=1e-7, rtol=1e-4)


def test_masks_learn_from_optimizer_1_too(tmp_path):
    model = Toy()
    make_runner(tmp_path, dict(type="mmitp.PruneHook", target=0.5, b=0, begin=3, end=4), model=model).train()
    assert not torch.equal(model.body.prune_mask, torch.ones(8))


def test_frozen_masks_stay_while_weights_train_on(tmp_path):
    class Watch(PruneHook):
        def after_train_epoch(self, runner):
            super().after_train_epoch(runner)
            history.append((self.budget.kept_macs(), self.masks["body"].weight.detach().clone()))

    history = []
    make_runner(tmp_path, Watch(target=0.5, b=0, begin=0, end=2), epochs=4).train()
    assert history[1][0] == history[2][0] == history[3][0]
    assert not torch.equal(history[2][1], history[3][1])


def test_auto_reaches_the_target_by_itself(tmp_path):
    optim = dict(
        type="OptimWrapper",
        optimizer=dict(type="Adam", lr=1e-3, weight_decay=0.0),
        paramwise_cfg=dict(custom_keys={"prune_mask": dict(lr_mult=0.0, decay_mult=0.0)}),
    )
    hook = dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=2, end=26)
    make_runner(tmp_path, hook, epochs=28, optim=optim, model=Toy(width=32)).train()
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert 0.4 <= report["ratio_before"] <= 0.54  # a channel is a thirty-second of this network
    assert report["switched_off"] <= 2


class Branches(Toy):
    """Two convolutions of the same cost read the stem; the classifier weighs what the second gives by a hundredth."""

    def __init__(self):
        super().__init__(masked=False, norm=False)
        self.faint = nn.Conv2d(8, 8, 3, padding=1)
        mask_model(self, include=["body", "faint"])

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.stem(inputs).relu()
        x = self.fc((self.body(x).relu() + 0.01 * self.faint(x).relu()).mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(x, data_samples)) if mode == "loss" else x


@pytest.mark.parametrize("push", ["fisher", "balanced"])
def test_fisher_takes_the_layer_that_matters_least_and_balanced_a_part_of_each(tmp_path, push):
    # At 64 places the stem multiplies 216 times, body and faint 576 each, the classifier 16 times altogether: 87,568. A
    # channel of one of them costs 64 * 72. Seven of faint's leave 0.63 of it, six 0.68; the floor keeps the eighth.
    hook = dict(type="mmitp.PruneHook", target=0.66, push=push, begin=0, end=8, min_keep=0.125, fill=False)
    runner = make_runner(tmp_path, hook, epochs=8, model=Branches())
    runner.train()
    kept = {name: int(layer.prune_pattern.sum()) for name, layer in masked_layers(runner.model).items()}
    if push == "fisher":
        assert kept == dict(body=8, faint=1)
    else:
        assert all(3 <= channels <= 5 for channels in kept.values())
    logged = [json.loads(line) for line in next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    assert any("ops_path" in row for row in logged)
    assert any("b" in row for row in logged) == (push == "balanced")


@pytest.mark.parametrize("b", [0, "auto"])
def test_single_weights_are_pruned_to_the_target_too(tmp_path, b):
    hook = dict(type="mmitp.PruneHook", target=0.5, b=b, begin=0, end=6)
    model = Toy(granularity="weight")
    runner = make_runner(tmp_path, hook, model=model, epochs=7)
    runner.train()
    kept = model.body.prune_pattern
    assert kept.shape == model.body.weight.shape
    # 64 positions: 216 multiplications of the stem, 16 of the classifier once, and those of the kept weights.
    assert hook_of(runner).budget.kept_macs() == 64 * (216 + int(kept.sum())) + 16
    assert 0.45 < hook_of(runner).budget.kept_macs() / hook_of(runner).budget.dense_macs <= 0.5
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert report["granularity"] == "weight"
    assert report["params_kept"] == 842 - int((kept == 0).sum())


def test_fill_ends_no_further_below_than_a_channel_costs(tmp_path):
    hook = dict(type="mmitp.PruneHook", target=0.5, b=1e6, begin=0, end=2, fill=True)
    runner = make_runner(tmp_path, hook)
    runner.train()
    budget = hook_of(runner).budget
    on = budget.flat_pattern()
    assert budget.macs_of(on) <= 0.5 * budget.dense_macs
    if budget.macs_of(on) < 0.99 * 0.5 * budget.dense_macs:
        for i in (~on).nonzero().flatten():
            more = on.clone()
            more[i] = True
            assert budget.macs_of(more) > 0.5 * budget.dense_macs


def test_a_missed_target_stops_the_run_on_request(tmp_path):
    hook = dict(type="mmitp.PruneHook", target=0.5, b=0, begin=0, end=2, on_miss="error")
    with pytest.raises(RuntimeError, match="above the target"):
        make_runner(tmp_path, hook).train()


def test_a_missed_target_is_kept_on_request_and_said(tmp_path, caplog):
    hook = dict(type="mmitp.PruneHook", target=0.5, b=0, begin=0, end=2, on_miss="warn")
    runner = make_runner(tmp_path, hook)
    runner.train()
    assert float(hook_of(runner).budget.ratio()) > 0.5
    assert "frozen as they are" in (next(tmp_path.glob("*/*.log"))).read_text()


def test_it_warns_early_that_the_pace_will_not_do(tmp_path):
    hook = dict(type="mmitp.PruneHook", target=0.5, b=1e-6, begin=0, end=30, lr=0.01)
    make_runner(tmp_path, hook, epochs=30).train()
    log = (next(tmp_path.glob("*/*.log"))).read_text()
    warning = next(line for line in log.splitlines() if "at the present pace" in line)
    assert "b='auto'" in warning
    assert log.index("at the present pace") < log.index("Epoch(train) [10]"), "not early"


def test_the_b_it_names_arrives(tmp_path):
    """The forecast's advice is followed and the target is reached inside the window."""
    optim = dict(
        type="OptimWrapper",
        optimizer=dict(type="SGD", lr=0.01, weight_decay=0.0),
        paramwise_cfg=dict(custom_keys={"prune_mask": dict(lr_mult=0.0)}),
    )
    hook = dict(type="mmitp.PruneHook", target=0.5, b=1e-3, begin=0, end=30, lr=0.01)
    make_runner(tmp_path / "a", hook, epochs=30, optim=optim).train()
    log = (next((tmp_path / "a").glob("*/*.log"))).read_text()
    advice = float(log.split("About b=")[1].split()[0])
    make_runner(tmp_path / "b", dict(hook, b=advice * 1.2), epochs=30, optim=optim).train()
    assert json.loads((tmp_path / "b" / "pruning.json").read_text())["switched_off"] == 0


def test_iteration_based_loops_take_the_window_in_iterations(tmp_path):
    loop = dict(type="IterBasedTrainLoop", max_iters=10)
    hook = PruneHook(target=0.5, b=0, begin=2, end=7)
    make_runner(tmp_path, hook, loop=loop).train()
    assert hook.steps == 5
    assert hook.frozen


@pytest.mark.parametrize(("begin", "end"), [(2, 7), (1 / 16, 7 / 32)])
def test_loops_by_epochs_take_the_window_in_iterations_on_request(tmp_path, begin, end):
    """Eight epochs of four iterations: the window opens in the middle of one and closes in the middle of the next."""
    hook = PruneHook(target=0.5, b=0, begin=begin, end=end, by_epoch=False)
    frozen_after = []

    class Watch(Hook):
        def after_train_iter(self, runner, *_, **__):
            frozen_after.append(hook.frozen)

    make_runner(tmp_path, hook, epochs=8, extra_hooks=[Watch()]).train()
    assert hook.steps == hook.window_steps == 5
    assert frozen_after == [False] * 6 + [True] * 26
    saved = torch.load(tmp_path / "epoch_8.pth", weights_only=False)
    assert saved["mmitp_prune_hook"]["window"] == [2, 7]


def test_a_window_in_iterations_is_no_window_of_as_many_epochs(tmp_path):
    checkpoint = dict(checkpoint=dict(type="CheckpointHook", interval=1))
    hook = dict(type="mmitp.PruneHook", target=0.5, b=0, begin=1, end=2)
    make_runner(tmp_path, hook, epochs=3, default_hooks=checkpoint).train()
    resumed = dict(load_from=str(tmp_path / "epoch_2.pth"), resume=True)
    with pytest.raises(ValueError, match="by_epoch"):
        make_runner(tmp_path, dict(hook, by_epoch=False), epochs=3, **resumed).train()


def test_once_an_epoch_is_the_last_step_of_each(tmp_path):
    hook = PruneHook(target=0.5, b=0, begin=1, end=3, interval="epoch")
    make_runner(tmp_path, hook).train()
    assert hook.steps == 2


@pytest.mark.parametrize(("accumulated", "steps"), [(2, 7), (3, 7), (8, 4)])
def test_once_an_epoch_with_accumulated_gradients_too(tmp_path, accumulated, steps):
    # 4 iterations an epoch: every third is the last update of its epoch at iterations 6, 9, 12, 15, 18, ...
    optim = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01), accumulative_counts=accumulated)
    hook = PruneHook(target=0.5, b=0, begin=1, end=8, interval="epoch")
    make_runner(tmp_path, hook, epochs=9, optim=optim).train()
    assert hook.steps == steps
    assert abs(hook.window_steps - steps) <= 1


def test_once_an_epoch_needs_epochs(tmp_path):
    hook = PruneHook(target=0.5, begin=2, end=7, interval="epoch")
    with pytest.raises(ValueError, match="needs a loop by epochs"):
        make_runner(tmp_path, hook, loop=dict(type="IterBasedTrainLoop", max_iters=10)).train()


def test_layers_frozen_behind_its_back_are_named_at_once(tmp_path):
    class Freezes(Toy):
        def train(self, mode=True):
            super().train(mode)
            self.body.requires_grad_(False)
            return self

    with pytest.raises(ValueError, match=r"masks of body .*frozen_stages.*exclude=\['body'\]"):
        make_runner(tmp_path, PruneHook(target=0.5, begin=2, end=4), model=Freezes()).train()


def test_pruned_networks_are_pruned_further(tmp_path):
    checkpoint = dict(checkpoint=dict(type="CheckpointHook", interval=1))
    first = make_runner(tmp_path / "a", PruneHook(target=0.8, b=0, begin=0, end=1), epochs=2, default_hooks=checkpoint)
    first.train()
    for target, trains in ((0.3, True), (0.8, False)):
        hook = PruneHook(target=target, b=0, begin=0, end=2)
        make_runner(tmp_path / f"b{target}", hook, load_from=str(tmp_path / "a" / "epoch_2.pth")).train()
        assert float(hook.budget.ratio()) <= target
        assert (hook.steps > 0) == trains
        text = "".join(path.read_text() for path in (tmp_path / f"b{target}").glob("*/*.log"))
        assert ("which meets the target 0.8: they stay as they are, and no mask trains" in text) != trains


@pytest.mark.parametrize(
    ("options", "told"),
    [({}, True), (dict(push="balanced"), False), (dict(push="fisher"), False), (dict(b=1.0), False)],
)
def test_a_run_from_trained_weights_hears_of_the_push_for_them(tmp_path, options, told):
    dense = make_runner(tmp_path / "dense", None, epochs=1, default_hooks={})
    dense.train()
    torch.save(dense.model.state_dict(), tmp_path / "dense.pth")
    for start, hears in ((str(tmp_path / "dense.pth"), told), (None, False)):
        hook = dict(type="mmitp.PruneHook", target=0.5, begin=0, end=2, **options)
        runner = make_runner(tmp_path / f"pruned{start is None}", hook, epochs=2, load_from=start)
        runner.train()
        text = "".join(path.read_text() for path in (tmp_path / f"pruned{start is None}").glob("*/*.log"))
        assert ("push='fisher' in a short window" in text) == hears


def test_resuming_states_the_budget_for_the_same_image_size(tmp_path):
    class Wide(ToyData):
        def __getitem__(self, i):
            return dict(inputs=self.x[i].repeat(1, 1, 3), label=self.y[i])

    checkpoint = dict(checkpoint=dict(type="CheckpointHook", interval=1))
    hook = dict(type="mmitp.PruneHook", target=0.5, begin=0, end=4)
    make_runner(tmp_path, hook, default_hooks=checkpoint).train()
    again = make_runner(tmp_path / "again", hook, epochs=4, load_from=str(tmp_path / "epoch_2.pth"), resume=True)
    again._train_dataloader["dataset"] = Wide()
    again.train()
    assert hook_of(again).input_shape == (8, 8)


def test_gradient_accumulation_takes_one_step_an_update(tmp_path):
    optim = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01), accumulative_counts=2)
    hook = PruneHook(target=0.5, b=0, begin=1, end=3)
    make_runner(tmp_path, hook, optim=optim).train()
    assert hook.steps == hook.window_steps == 4


def test_mask_gradients_do_not_count_in_gradient_clipping(tmp_path):
    optim = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01), clip_grad=dict(max_norm=1e-9))
    model = Toy()
    runner = make_runner(
        tmp_path, dict(type="mmitp.PruneHook", target=0.5, b=0, begin=3, end=4), model=model, optim=optim, epochs=4
    )
    runner.train()
    assert not torch.allclose(model.body.prune_mask, torch.ones(8), atol=1e-6)


def test_a_step_skipped_by_the_gradient_scaler_leaves_the_masks_alone(tmp_path):
    class Poisoned(PruneHook):
        def _take_gradients(self, optimizer):
            gradients = [layer.prune_mask.grad.clone() for layer in self.masks.values()]
            for layer in self.masks.values():
                layer.prune_mask.grad.fill_(math.nan)
            super()._take_gradients(optimizer)
            for layer, gradient in zip(self.masks.values(), gradients, strict=True):
                layer.prune_mask.grad.copy_(gradient)  # Optimizer 1 is not what is tested

        def _optimizer_2(self):
            before = {n: m.prune_mask.detach().clone() for n, m in self.masks.items()}
            super()._optimizer_2()
            for n, m in self.masks.items():
                assert torch.equal(before[n], m.prune_mask)

    hook = Poisoned(target=0.5, b=10, begin=0, end=2, on_miss="warn")
    make_runner(tmp_path, hook, epochs=2).train()
    assert hook.steps == 0


@OPTIM_WRAPPERS.register_module(force=True)  # other tests import this file by another name
class CpuScaler(OptimWrapper):
    """mmengine's AmpOptimWrapper with torch's scaler of the CPU, and no other precision."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)

    def backward(self, loss, **kwargs):
        self.scaler.scale(loss).backward()
        self._inner_count += 1

    def step(self, **kwargs):
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_scale_does_not_reach_the_masks(tmp_path, fused):
    def train(wrapper, poisoned=None):
        torch.manual_seed(0)
        model, passes = Toy(), itertools.count()
        if poisoned is not None:  # an overflow outside of the masks: their own gradients are finite
            model.stem.weight.register_hook(lambda g: g * math.inf if next(passes) == poisoned else g)
        hook = PruneHook(target=0.2, b=0, begin=0, end=1, lr=1.0, on_miss="warn")
        optim = dict(type=wrapper, optimizer=dict(type="SGD", lr=0.01, fused=fused))
        make_runner(tmp_path, hook, epochs=1, model=model, optim=optim).train()
        return hook.steps, model.body.prune_mask.detach()

    steps, masks = train("OptimWrapper")
    assert steps == 4
    scaled_steps, scaled = train("CpuScaler")
    assert scaled_steps == 4
    torch.testing.assert_close(scaled, masks, rtol=1e-4, atol=1e-5)
    assert (masks - 1).abs().max() > 1e-3
    steps, masks = train("CpuScaler", poisoned=3)
    assert steps == 3
    assert (masks - 1).abs().max() < 1


def test_optimizer_2_takes_the_gradient_of_the_backward_pass(tmp_path):
    # Nesterov momentum with foreach adds the momentum to the gradients in place.
    def train(foreach):
        torch.manual_seed(0)
        model = Toy()
        optimizer = dict(type="SGD", lr=0.01, momentum=0.9, nesterov=True, foreach=foreach)
        hook = PruneHook(target=0.2, b=0, begin=0, end=2, lr=1.0, on_miss="warn")
        make_runner(tmp_path, hook, epochs=2, model=model, optim=dict(type="OptimWrapper", optimizer=optimizer)).train()
        return model.body.prune_mask.detach()

    torch.testing.assert_close(train(foreach=True), train(foreach=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [dict(begin=1, end=7), dict(begin=6, end=27, by_epoch=False)])
@pytest.mark.parametrize("b", [dict(b=200.0), dict(b="auto"), dict(b="auto", push="fisher")], ids=str)
def test_resuming_in_the_window_continues_exactly(tmp_path, b, window):
    checkpoint = dict(checkpoint=dict(type="CheckpointHook", interval=1), logger=dict(type="LoggerHook", interval=1))
    hook = dict(type="mmitp.PruneHook", target=0.4, lr=0.01, **b, **window)
    whole, resumed = Toy(norm=False), Toy(norm=False)
    torch.manual_seed(1)
    start = {k: v.clone() for k, v in Toy(norm=False).state_dict().items()}
    whole.load_state_dict(start)
    make_runner(tmp_path / "a", hook, epochs=8, model=whole, default_hooks=checkpoint).train()
    runner = make_runner(
        tmp_path / "b", hook, epochs=8, model=resumed, default_hooks=checkpoint, seed=0,
        load_from=str(tmp_path / "a" / "epoch_4.pth"), resume=True,
    )  # fmt: skip
    runner.train()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    final = torch.load(tmp_path / "b" / "epoch_8.pth", weights_only=False)["mmitp_prune_hook"]
    assert final == torch.load(tmp_path / "a" / "epoch_8.pth", weights_only=False)["mmitp_prune_hook"]


def test_resuming_after_the_freeze_keeps_the_pattern(tmp_path):
    checkpoint = dict(checkpoint=dict(type="CheckpointHook", interval=1))
    hook = dict(type="mmitp.PruneHook", target=0.5, b=0, begin=0, end=2)
    first = make_runner(tmp_path, hook, epochs=3, default_hooks=checkpoint)
    first.train()
    pattern = masked_layers(first.model)["body"].prune_pattern.clone()
    again = make_runner(
        tmp_path, hook, epochs=5, default_hooks=checkpoint, load_from=str(tmp_path / "epoch_3.pth"), resume=True
    )
    again.train()
    assert hook_of(again).frozen
    assert torch.equal(masked_layers(again.model)["body"].prune_pattern, pattern)


@pytest.mark.parametrize("update_buffers", [False, True])
def test_the_averaged_model_prunes_the_same_channels(tmp_path, update_buffers):
    ema = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1, update_buffers=update_buffers)
    hook = dict(type="mmitp.PruneHook", target=0.5, b=0, begin=0, end=2)
    checkpoint = dict(checkpoint=dict(type="CheckpointHook", interval=1))
    runner = make_runner(tmp_path, hook, epochs=4, extra_hooks=[ema], default_hooks=checkpoint)
    runner.train()
    saved = torch.load(tmp_path / "epoch_4.pth", weights_only=False)
    source = masked_layers(runner.model)
    for name, layer in source.items():
        assert torch.equal(saved["state_dict"][f"{name}.prune_pattern"], layer.prune_pattern)
        assert torch.equal(saved["ema_state_dict"][f"module.{name}.prune_pattern"], layer.prune_pattern)


def test_best_checkpoints_come_from_models_within_the_budget_only(tmp_path):
    from mmengine.evaluator import BaseMetric

    class Falling(BaseMetric):
        """Every evaluation is worse than the one before: the first would always be the best."""

        value = 10.0

        def process(self, data_batch, data_samples):
            self.results.append(0)

        def compute_metrics(self, results):
            Falling.value -= 1
            return dict(score=Falling.value)

    checkpoint = dict(checkpoint=dict(type="CheckpointHook", interval=1, save_best="score", rule="greater"))
    runner = make_runner(
        tmp_path, dict(type="mmitp.PruneHook", target=0.5, b=0, begin=0, end=2), epochs=4, default_hooks=checkpoint,
        val_dataloader=dict(batch_size=8, dataset=ToyData(), sampler=dict(type="DefaultSampler"), num_workers=0),
        val_cfg=dict(), val_evaluator=[Falling()],
    )  # fmt: skip
    runner.train()
    assert [p.name for p in tmp_path.glob("best_*")] == ["best_score_epoch_2.pth"]


def test_operations_and_hardware_loss_are_logged(tmp_path):
    runner = make_runner(tmp_path, dict(type="mmitp.PruneHook", target=0.5, b=0, begin=1, end=3))
    runner.train()
    rows = [json.loads(line) for line in next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    logged = [r for r in rows if "ops_kept" in r]
    assert logged[0]["ops_kept"] == 1.0
    assert logged[0]["L_HW"] == 0.5
    assert logged[-1]["ops_kept"] <= 0.5
    assert logged[-1]["L_HW"] == 0.0
    assert any("channels_kept/body" in r for r in rows)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(target=0), "target"),
        (dict(target=1.5), "target"),
        (dict(target=0.5, b="fast"), "'auto'"),
        (dict(target=0.5, begin=5, end=5), "begin < end"),
        (dict(target=0.5, lr=0), "lr"),
        (dict(target=0.5, interval="step"), "interval"),
        (dict(target=0.5, on_miss="ignore"), "on_miss"),
        (dict(target=0.5, by_epoch="no"), "by_epoch"),
        (dict(target=0.5, input_shape=(8,)), "input_shape"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        PruneHook(**arguments)


def test_a_window_longer_than_the_run_is_an_error_that_says_what_would_fit(tmp_path):
    with pytest.raises(ValueError, match=r"begin=1, end=3"):
        make_runner(tmp_path, dict(type="mmitp.PruneHook", target=0.5)).train()


def test_a_model_without_masks_is_an_error_that_shows_the_line(tmp_path):
    with pytest.raises(ValueError, match="mmitp.MaskedModel"):
        make_runner(tmp_path, dict(type="mmitp.PruneHook", target=0.5, begin=0, end=2), model=Toy(masked=False)).train()


def test_two_hooks_in_one_run_are_an_error(tmp_path):
    second = dict(type="mmitp.PruneHook", target=0.3, begin=0, end=1)
    with pytest.raises(ValueError, match="two PruneHooks in one run"):
        make_runner(tmp_path, PruneHook(target=0.5, begin=0, end=1), epochs=2, extra_hooks=[second]).train()


def test_double_precision_networks(tmp_path):
    """Their images are of double precision too, and so is what the channels are followed with."""

    class Double(ToyPreprocessor):
        def forward(self, data, training=False):
            return {k: v.double() if v.is_floating_point() else v for k, v in super().forward(data, training).items()}

    model = Toy(width=16).double()
    model.data_preprocessor = Double()
    hook = PruneHook(target=0.5, begin=0, end=1, slim_at_end=True)
    runner = make_runner(tmp_path, hook, epochs=2, model=model)
    runner.train()
    assert {p.dtype for p in runner.model.parameters()} == {torch.float64}
    assert hook.slimmed["ratio"] <= 0.5


def test_an_unreachable_target_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="cannot be reached"):
        make_runner(tmp_path, dict(type="mmitp.PruneHook", target=0.05, begin=0, end=2)).train()


def test_two_lines_compose_it_with_a_config(tmp_path):
    """One line for the model, one for the hook, on a stock-like config file; the original type stays a plain key."""
    base = tmp_path / "base.py"
    base.write_text(
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=18),\n"
        "             neck=dict(type='GlobalAveragePooling'),\n"
        "             head=dict(type='LinearClsHead', num_classes=2, in_channels=512))\n"
    )
    child = tmp_path / "child.py"
    child.write_text(
        "_base_ = ['./base.py']\n"
        "model = dict(type='mmitp.MaskedModel', of=_base_.model.type)\n"
        "custom_hooks = [dict(type='mmitp.PruneHook', target=0.5)]\n"
    )
    pytest.importorskip("mmpretrain")
    from mmengine.registry import DefaultScope

    cfg = Config.fromfile(child)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = ROOT_MODELS.build(cfg.model)
    assert type(model).__name__ == "ImageClassifier"
    assert len(masked_layers(model)) == 19  # 20 convolutions of ResNet-18 but the stem


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (dict(type="Adam", weight_decay=0.1), "L2"),
        (dict(type="Adam", weight_decay=0.1, decoupled_weight_decay=True), "decoupled"),
        (dict(type="AdamW", weight_decay=0.1), "decoupled"),
    ],
)
def test_the_log_says_how_masks_decay(tmp_path, caplog, optimizer, kind):
    if "decoupled_weight_decay" in optimizer:
        pytest.importorskip("torch", minversion="2.6")
    hook = PruneHook(target=0.9, begin=0, end=1)
    make_runner(tmp_path, hook, epochs=1, optim=dict(type="OptimWrapper", optimizer=dict(optimizer, lr=1e-4))).train()
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert f"1 masks in {optimizer['type']} with lr 0.0001, {kind} weight decay 0.1" in log


def test_the_images_channels_are_kept_and_restored(tmp_path):
    runner = make_runner(tmp_path, PruneHook(target=0.9, begin=0, end=1), epochs=1)
    runner.train()
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert saved["mmitp_prune_hook"]["channels"] == 3
    again = make_runner(tmp_path, PruneHook(target=0.9, begin=0, end=1), epochs=1, resume=True)
    again.train()
    assert hook_of(again).channels == 3


def test_the_log_says_the_phases_and_how_far_the_masks_are(tmp_path):
    make_runner(tmp_path, dict(type="mmitp.PruneHook", target=0.5, begin=1, end=3)).train()
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "masks train in epochs 2 to 3 of 4, the network with fixed masks in those from 4 on" in log
    told = re.findall(r"masks train, step (\d+) of 8: (0\.\d+|1\.0000) of the operations, target 0.5; they freeze", log)
    assert [int(step) for step, _ in told] == [2, 3, 4, 5, 6, 7, 8]  # from the second of 2 x 4 steps on, ten at most
    scalars = [json.loads(line) for line in next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    assert f"{float(told[0][1]):.4f}" in {f"{line['ops_kept']:.4f}" for line in scalars if "ops_kept" in line}
    assert log.rstrip().count("they freeze in about 0:00:00") >= 1  # the last step's


def test_accumulated_gradients_are_one_step_in_the_log(tmp_path):
    optim = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01), accumulative_counts=2)
    make_runner(tmp_path, dict(type="mmitp.PruneHook", target=0.5, begin=1, end=3), optim=optim).train()
    log = next(tmp_path.glob("*/*.log")).read_text()
    told = [int(step) for step in re.findall(r"masks train, step (\d+) of 4: ", log)]
    assert told == sorted(set(told))
    assert told[-1] == 4
