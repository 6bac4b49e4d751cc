"""Runs resumed in the middle of an epoch, or between a checkpoint and its validation, end as they would have."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toy_config import VALIDATION, same, tiny_config

from mmitp.engine.run import build_runner
from mmitp.engine.unfinished import KEY

STATES = ("state_dict", "optimizer", "param_schedulers", "mmitp_prune_hook", KEY)
EVERY = dict(type="CheckpointHook", interval=1, by_epoch=False)
STOPPER = dict(type="EarlyStoppingHook", monitor="accuracy", rule="greater", patience=3)
PLATEAU = dict(type="ReduceOnPlateauLR", monitor="accuracy", rule="greater", patience=0)


def load(path):
    return torch.load(path, weights_only=False)


def ends_alike(one, two, name):
    one, two = load(one / name), load(two / name)
    assert [key for key in STATES if not same(one[key], two[key])] == []
    assert (one["meta"]["epoch"], one["meta"]["iter"]) == (two["meta"]["epoch"], two["meta"]["iter"])


def every_iteration(folder, **more):
    cfg = tiny_config(folder, epochs=4, hook=dict(slim_at_end=True), **VALIDATION, **more)
    cfg.default_hooks.checkpoint = dict(EVERY)
    return cfg


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Five iterations an epoch; masks train in the second and the third."""
    folder = tmp_path_factory.mktemp("whole")
    build_runner(every_iteration(folder)).train()
    return folder


@pytest.mark.parametrize("done", [7, 10, 15, 18])
def test_a_run_resumed_inside_an_epoch_trains_every_batch_once(whole, tmp_path, done):
    """After iterations 10 and 15 no batch is left, but all that an epoch's end brings: schedule, freeze, validation."""
    build_runner(every_iteration(tmp_path, resume=True, load_from=str(whole / f"iter_{done}.pth"))).train()
    ends_alike(whole, tmp_path, "iter_20.pth")


def judged(folder, epochs=6, **more):
    cfg = tiny_config(folder, epochs=epochs, hooks=[STOPPER], checkpoint=dict(save_best="accuracy"), **VALIDATION)
    cfg.merge_from_dict(more)
    cfg.param_scheduler = dict(PLATEAU)
    return cfg


def test_what_goes_by_validations_goes_on_as_it_would_have(tmp_path):
    """Checkpoints are saved before their validation: a resumed run begins with it."""
    (runner := build_runner(judged(tmp_path / "whole"))).train()
    last = runner.epoch
    for epoch in range(1, last):
        more = dict(resume=True, load_from=str(tmp_path / f"whole/epoch_{epoch}.pth"))
        (again := build_runner(judged(tmp_path / f"from_{epoch}", **more))).train()
        assert again.epoch == last
        ends_alike(tmp_path / "whole", tmp_path / f"from_{epoch}", f"epoch_{last}.pth")
        scores = [run.message_hub.get_info("best_score") for run in (runner, again)]
        assert scores[0] == scores[1]


def test_a_resumed_run_keeps_no_best_network_from_above_the_budget(tmp_path):
    build_runner(judged(tmp_path / "whole", epochs=3)).train()
    more = dict(resume=True, load_from=str(tmp_path / "whole/epoch_1.pth"))  # all masks are on
    runner = build_runner(judged(tmp_path / "again", epochs=3, **more))
    runner.train_loop.stop_training = True
    runner.train()
    assert runner.message_hub.get_scalar("val/accuracy").current() is not None
    assert not list((tmp_path / "again").glob("best_*"))


@pytest.mark.parametrize("state", [dict(batches="1"), dict(patience=[(float("nan"), 0)]), dict(validated=None)])
def test_a_strange_state_is_refused_by_its_name(whole, tmp_path, state):
    checkpoint = load(whole / "iter_7.pth")
    checkpoint[KEY].update(state)
    torch.save(checkpoint, tmp_path / "iter_7.pth")
    with pytest.raises(ValueError, match=rf"iter_7.pth: {KEY}.{next(iter(state))} must "):
        build_runner(every_iteration(tmp_path, resume=True, load_from=str(tmp_path / "iter_7.pth"))).train()


@pytest.mark.parametrize("hooks", [True, False])
def test_a_data_set_smaller_than_its_batch_is_refused(tmp_path, hooks):
    cfg = tiny_config(tmp_path)
    cfg.train_dataloader.update(batch_size=64, drop_last=True)
    if not hooks:
        cfg.custom_hooks = []
    with pytest.raises(ValueError, match="gives no batch: its data set has 40 images.*a batch is 64. Lower"):
        build_runner(cfg).train()
