"""PruneHook in real Runners: what resuming keeps or refuses, and values that are not finite."""

import math
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

sys.path.insert(0, str(Path(__file__).parent))
import test_prune_hook as toy  # the toy Runner of the hook's other tests

from mmitp.engine.hooks import PruneHook
from mmitp.pruning import mask_model, masked_layers

CHECKPOINT = dict(checkpoint=dict(type="CheckpointHook", interval=1))


class Two(toy.Toy):
    """The toy with masks on its classifier too, and other choices."""

    def __init__(self, **prune):
        super().__init__(masked=False)
        if prune is not None:
            mask_model(self, **prune)


def run(work_dir, epochs=4, resume=None, model=None, extra_hooks=(), **hook):
    hook = PruneHook(**(dict(target=0.6, b=0, begin=0, end=2) | hook))
    runner = toy.make_runner(
        work_dir,
        hook,
        epochs=epochs,
        model=model,
        default_hooks=CHECKPOINT,
        extra_hooks=extra_hooks,
        load_from=None if resume is None else str(resume),
        resume=resume is not None,
    )
    runner.train()
    return hook


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four epochs of a toy; the window was from 0 to 2."""
    folder = tmp_path_factory.mktemp("first")
    run(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(target=0.3), "target=0.6, now target=0.3"),
        (dict(end=5), r"\(begin, end\)=\(0, 2\), now"),
        (dict(divisor=4), "divisor=1, now divisor=4"),
        (dict(fill=False), "fill=True, now fill=False"),
        (dict(min_keep=0.3), "min_keep"),
        (dict(cost="params"), "cost='operations', now cost='parameters'"),
    ],
)
def test_settings_that_decided_on_frozen_masks_cannot_change_by_resuming(tmp_path, trained, change, said):
    with pytest.raises(ValueError, match=f"frozen already, with {said}.*load_from"):
        run(tmp_path, epochs=6, resume=trained / "epoch_3.pth", **change)
    assert not list(tmp_path.glob("epoch_*.pth"))


def test_what_no_longer_matters_may_change(tmp_path, trained):
    assert run(tmp_path, epochs=5, resume=trained / "epoch_3.pth", b=7.0, lr=0.5).frozen


def test_settings_are_obeyed_while_masks_still_train(tmp_path, trained):
    hook = run(tmp_path, epochs=5, resume=trained / "epoch_1.pth", target=0.4, end=4)
    assert hook.frozen
    assert hook._ratio() <= 0.4
    assert hook.steps == 16  # four iterations an epoch, up to the new end
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "target: 0.6 -> 0.4" in log
    assert "the checkpoint's window was [0, 2] epochs, from now on it is [0, 4] epochs" in log


@pytest.mark.parametrize(
    ("prune", "said"),
    [
        (dict(granularity="weight"), r"'body' is of shape \(8,\) in the checkpoint"),
        (dict(linear=True), r"only in the model: \['fc'\]"),
        (dict(linear=True, exclude="body"), r"only in the checkpoint: \['body'\]"),
    ],
)
@pytest.mark.parametrize("epoch", [1, 3])
def test_other_masks_than_the_checkpoints_are_refused_in_one_line(tmp_path, trained, prune, said, epoch):
    with pytest.raises(ValueError, match=f"{said}.*load_from"):
        run(tmp_path, resume=trained / f"epoch_{epoch}.pth", model=Two(**prune))


def test_a_dense_run_cannot_be_resumed_with_masks(tmp_path):
    toy.make_runner(tmp_path, None, epochs=1, model=toy.Toy(masked=False), default_hooks=CHECKPOINT).train()
    with pytest.raises(ValueError, match="has no masks, the model has 1.*load_from"):
        run(tmp_path / "b", resume=tmp_path / "epoch_1.pth")


def test_pruned_further_starts_from_where_it_was(tmp_path, trained):
    ratios = []

    class Watch(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            ratios.append(toy.hook_of(runner)._ratio())

    hook = PruneHook(target=0.3, b=0, begin=1, end=2)
    checkpoint = str(trained / "epoch_4.pth")
    toy.make_runner(tmp_path, hook, extra_hooks=[Watch()], load_from=checkpoint).train()
    assert ratios[0] <= 0.6
    assert hook._ratio() <= 0.3


def test_parts_of_the_run_are_a_window_too(tmp_path):
    hook = PruneHook(target=0.5, b=0, begin=1 / 15, end=1 / 3)
    toy.make_runner(tmp_path, hook, epochs=9).train()
    assert (hook.begin, hook.end, hook.steps) == (1, 3, 8)
    for window, text in ((dict(begin=0.5, end=0.3), "begin < end"), (dict(begin=1.5, end=3), "begin must be whole")):
        with pytest.raises(ValueError, match=text):
            PruneHook(target=0.5, **window)
    with pytest.raises(ValueError, match="is empty"):
        toy.make_runner(tmp_path, PruneHook(target=0.5, begin=3, end=0.3), epochs=9).train()


class Poison(Hook):
    """Makes one iteration's loss NaN."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            data_batch["inputs"][0][0, 0, 0] = math.nan


@pytest.mark.parametrize("begin", [0, 3])  # inside the window, and before it
def test_a_nan_loss_ends_the_run_at_once_with_the_mask_and_the_iteration(tmp_path, begin):
    with pytest.raises(ValueError, match=r"in iteration 7 layer 'body' .*not finite.*lower the learning"):
        run(tmp_path, extra_hooks=[Poison(6)], begin=begin, end=4)
    assert sorted(p.name for p in tmp_path.glob("epoch_*.pth")) == ["epoch_1.pth"]
    assert not (tmp_path / "pruning.json").exists()


def test_a_poisoned_network_is_not_saved_over_a_good_one(tmp_path):
    with pytest.raises(ValueError, match=r"after iteration 16 .* values that are not finite.*nothing is saved"):
        run(tmp_path, extra_hooks=[Poison(13)])  # masks froze at iteration 8
    assert sorted(p.name for p in tmp_path.glob("epoch_*.pth")) == ["epoch_1.pth", "epoch_2.pth", "epoch_3.pth"]


def test_the_freeze_ends_close_below_the_target_by_default(tmp_path):
    model = toy.Toy(width=64)
    optim = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, weight_decay=0.3))
    hook = PruneHook(target=0.9, b=50.0, begin=0, end=4)
    toy.make_runner(tmp_path, hook, epochs=4, model=model, optim=optim).train()
    assert 0.89 <= hook._ratio() <= 0.9  # decay took more than was asked for
    assert masked_layers(model)["body"].mask_frozen


@pytest.mark.parametrize("change", [dict(b=math.inf), dict(lr=math.nan), dict(slim_at_end="no"), dict(divisor=8.5)])
def test_arguments_that_would_be_misread_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PruneHook(target=0.5, **change)


def test_the_state_survives_without_pickled_code(tmp_path, trained):
    """Plain numbers and tensors: torch loads it with weights_only."""
    state = torch.load(trained / "epoch_1.pth", weights_only=False)["mmitp_prune_hook"]
    torch.save(state, tmp_path / "state.pth")
    assert torch.load(tmp_path / "state.pth", weights_only=True)["pruner"]["count"] == 4
