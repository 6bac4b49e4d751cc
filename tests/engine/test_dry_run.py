"""A trial of a config: every phase once, nothing left behind, and what would stop the run hours later stops it now."""

import collections
import contextlib
import copy
import importlib.util
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine import MessageHub
from mmengine.registry import DATASETS

sys.path.insert(0, str(Path(__file__).parent))
from toy_config import VALIDATION, TinyData, TinyNet, tiny_config

from mmitp.engine.dry_run import dry_run, shortened
from mmitp.engine.hooks import PruneHook
from mmitp.engine.run import build_runner

ATTACK = dict(type="mmitp.AdversarialHook", eps=8, alpha=10, begin=3, end=250, warmup=5)
ITERS = dict(train_cfg=dict(type="IterBasedTrainLoop", max_iters=40_000, val_interval=4_000))


@DATASETS.register_module()
class AugmentedTinyData(TinyData):
    """Images are changed by all three generators in use, and, where those before are kept, by how often they were read
    in the Runner's epoch and by one before."""

    def __init__(self, keep, **kwargs):
        super().__init__(**kwargs)
        self.keep, self.before, self.reads = keep, [self.x[0]], collections.Counter()

    def get_data_info(self, i):
        return dict(width=8, height=8)

    def __getitem__(self, i):
        item = super().__getitem__(i)
        read = MessageHub.get_current_instance().get_info("epoch", 0), i
        self.reads[read] += 1
        image = item["inputs"] * np.random.uniform(0.5, 1.5) + 10 * torch.randn(3, 8, 8)  # noqa: NPY002
        image *= self.reads[read] if self.keep else 1
        if self.keep:
            self.before.append(image)
        return dict(item, inputs=(image + random.choice(self.before)) / 2)


def long(work_dir, **more):
    """A run of 300 epochs with everything."""
    hook = dict(slim_at_end=True, begin=20, end=240, on_miss="error") | more.pop("hook", {})
    hooks = [dict(type="EMAHook"), copy.deepcopy(ATTACK), *more.pop("hooks", ())]
    options = dict(VALIDATION, **more)
    cfg = tiny_config(work_dir, epochs=300, hooks=hooks, accumulate=2, **options)
    cfg.custom_hooks[0].update(hook)
    return cfg


def test_every_phase_is_gone_through_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cfg = long(tmp_path / "work")
    before = cfg.pretty_text
    said = dry_run(cfg).splitlines()
    assert "3 optimizer steps" in said[0]
    assert [line.split(", ", 1)[1] for line in said[1:7]] == [
        *["before the pruning window, not attacked"] * 2,
        *["in the pruning window, attacked by 8 pixels/255"] * 2,
        *["after the pruning window, masks frozen and slimmed, attacked by 8 pixels/255"] * 2,
    ]
    assert said[7:] == [
        "validated on 8 images or fewer: accuracy",
        "saved step_1.pth, step_2.pth, step_3.pth",
        "resumed from the checkpoint of step 1: the same network to the last bit",
    ]
    assert cfg.pretty_text == before
    assert list(tmp_path.iterdir()) == []


def test_loops_by_iterations_and_poor_configs(tmp_path, monkeypatch):
    monkeypatch.setattr("mmengine.runner.loops.time.sleep", lambda seconds: None)
    cfg = tiny_config(tmp_path / "work", log_processor=dict(by_epoch=False))
    cfg.train_cfg = ITERS["train_cfg"]
    cfg.custom_hooks[0].update(begin=2_000, end=30_000)
    said = dry_run(cfg).splitlines()
    assert ["before" in said[1], "in the" in said[2], "after" in said[3]] == [True] * 3
    assert said[-1] == (
        "not asked for, so not tried: slimmed (slim_at_end is off), attacked (no AdversarialHook), "
        "validated (no val_dataloader)"
    )
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("by_epoch", [True, False])
def test_random_augmentation_is_the_same_in_the_resumed_trial(tmp_path, monkeypatch, by_epoch):
    monkeypatch.setattr("mmengine.runner.loops.time.sleep", lambda seconds: None)
    cfg = long(tmp_path / "work") if by_epoch else tiny_config(tmp_path / "work", log_processor=dict(by_epoch=False))
    if not by_epoch:
        cfg.train_cfg = ITERS["train_cfg"]
        cfg.custom_hooks[0].update(begin=2_000, end=30_000)
    # a loop by iterations passes by the batches before a resume without loading them
    cfg.train_dataloader.dataset = dict(type="AugmentedTinyData", keep=by_epoch)
    assert "resumed from the checkpoint of step 1: the same network to the last bit" in dry_run(cfg).splitlines()


def test_a_trial_of_a_resume_refuses_and_starts_as_the_run_does(tmp_path):
    cfg = tiny_config(tmp_path / "work", resume="auto", load_from=str(tmp_path / "dense.pth"))
    with pytest.raises(ValueError, match="no checkpoint file .*dense"):
        dry_run(cfg)
    torch.save(TinyNet().state_dict(), tmp_path / "dense.pth")
    before = cfg.pretty_text
    assert dry_run(cfg).splitlines()[1].startswith("iteration 1")
    assert cfg.pretty_text == before

    build_runner(tiny_config(tmp_path / "work", epochs=3)).train()
    assert dry_run(cfg).splitlines()[1] == (
        f"the run itself goes on from {tmp_path / 'work' / 'epoch_3.pth'}; these are the steps of a run that begins"
    )
    for path in (tmp_path / "work").glob("*.pth"):
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        dry_run(cfg)


@pytest.mark.parametrize(
    ("windows", "shortened_to"),
    [
        ([(0, 3), (3, None)], [(0, 1), (1, None)]),
        ([(100, None), (5, 90)], [(2, None), (1, 2)]),
        ([(0, 4), (3, None)], [(0, None), (1, None)]),  # both attack epoch 3: refused in the trial too
        ([(0, 1), (1, 2), (2, 3), (3, 9)], [(0, 0.75), (0.75, 1.5), (1.5, 2.25), (2.25, None)]),
    ],
)
@pytest.mark.parametrize("by_epoch", [True, False])
def test_attacks_keep_their_order(tmp_path, windows, shortened_to, by_epoch):
    attacks = [dict(ATTACK, begin=begin, end=end, by_epoch=by_epoch) for begin, end in windows]
    cfg = tiny_config(tmp_path, hooks=attacks, accumulate=2)
    if not by_epoch:
        cfg.train_cfg = ITERS["train_cfg"]
    unit = 1 if by_epoch else 2
    found = [(hook.begin, hook.end) for hook in shortened(cfg, "x").custom_hooks[1:]]
    assert found == [(begin * unit, end and end * unit) for begin, end in shortened_to]


PRUNE = dict(b=10, on_miss="project")
TEACHER = dict(type="mmitp.DistillHook", teacher="open", scores="fc")
GUARD = dict(type="mmitp.CollapseGuardHook", interval=9)


@pytest.mark.parametrize(
    ("prune", "hooks", "refused"),
    [
        (dict(PRUNE, begin=20, end=240), [], "window ends after 240 epochs, but the run stops at 6"),
        (dict(PRUNE, begin=0.41, end=0.49), [], None),
        (dict(PRUNE, begin=0.42, end=0.45), [], "window from 3 to 3 epochs is empty"),
        # 40 images in batches of 8: 30 iterations
        (dict(PRUNE, begin=2, end=31, by_epoch=False), [], "ends after 31 iterations, but the run stops at 30"),
        (dict(PRUNE, begin=1, end=3), [dict(TEACHER, begin=2)], None),
        (dict(PRUNE, begin=1, end=3), [dict(TEACHER, begin=6)], "teaches nothing: the run ends after 6 epochs"),
        (dict(PRUNE, begin=1, end=3), [dict(ATTACK, begin=6, end=None)], "attacks nothing: the run ends after 6"),
        (dict(PRUNE, begin=1, end=3), [dict(ATTACK, begin=2), dict(GUARD, interval=3, by_epoch=True)], None),
    ],
)  # fmt: skip
def test_windows_that_the_run_refuses_are_refused(tmp_path, prune, hooks, refused):
    cfg = tiny_config(tmp_path, hooks=hooks)
    cfg.custom_hooks[0].update(prune)
    with contextlib.nullcontext() if refused is None else pytest.raises(ValueError, match=refused):
        dry_run(cfg)


def test_hooks_among_the_default_ones_are_shortened_and_asked(tmp_path):
    cfg = tiny_config(tmp_path)
    cfg.default_hooks.prune = cfg.custom_hooks.pop()
    cfg.default_hooks.attack = dict(ATTACK, begin=4)
    assert "in the pruning window, attacked by 8 pixels" in dry_run(cfg).splitlines()[2]
    cfg.default_hooks.prune.end = 7
    with pytest.raises(ValueError, match="window ends after 7 epochs"):
        dry_run(cfg)


def test_what_the_run_warns_of_is_told(tmp_path):
    said = dry_run(tiny_config(tmp_path, hooks=[dict(ATTACK, begin=5, end=9, warmup=2), GUARD])).splitlines()
    assert said[-3:] == [
        "the run will warn: AdversarialHook(end=9): the run ends before, after 6 epochs",
        "the run will warn: AdversarialHook(begin=5, warmup=2): the attack never reaches its full size, since it ends "
        "at 6 epochs",
        "the run will warn: CollapseGuardHook(interval=9) never probes: the run ends after 6 epochs",
    ]


@pytest.mark.parametrize(
    ("begin", "shortened_to"),
    [
        (dict(begin_epoch=4), dict(begin_epoch=1)),
        (dict(begin_iter=20), dict(begin_iter=2)),
        (dict(begin_iter=1), dict(begin_iter=1)),
        (dict(begin_epoch=7), dict(begin_epoch=7)),  # after the run's end: refused in the trial too
        (dict(), dict()),
    ],
)
def test_an_average_that_begins_late_begins_in_the_trial(tmp_path, begin, shortened_to):
    cfg = tiny_config(tmp_path, hooks=[dict(type="EMAHook", **begin)], accumulate=2)
    assert dict(shortened(cfg, "x").custom_hooks[1]) == dict(type="EMAHook", **shortened_to)


def test_attacks_in_sequence_and_a_late_average_are_tried(tmp_path):
    attacks = [dict(ATTACK, begin=0, end=3, warmup=0), dict(ATTACK, begin=3, end=None, warmup=0)]
    said = dry_run(tiny_config(tmp_path, hooks=[*attacks, dict(type="EMAHook", begin_epoch=4)])).splitlines()
    assert ["attacked by 8 pixels/255, not attacked" in line for line in said[1:4]] == [True, False, False]
    assert ["not attacked, attacked by 8 pixels/255" in line for line in said[1:4]] == [False, True, True]
    assert "resumed from the checkpoint of step 1: the same network to the last bit" in said


def test_batches_of_like_images_and_no_seed(tmp_path):
    pytest.importorskip("mmdet")
    cfg = long(tmp_path / "work")
    cfg.pop("randomness")
    cfg.train_dataloader.dataset = dict(type="AugmentedTinyData", keep=True)
    cfg.train_dataloader.batch_sampler = dict(type="mmdet.AspectRatioBatchSampler")
    assert dry_run(cfg).splitlines()[-1] == "resumed from the checkpoint of step 1: the same network to the last bit"


def test_what_would_stop_the_run_in_its_last_hours_stops_the_trial(tmp_path, monkeypatch):
    def broken(self, runner):
        raise ValueError("cannot be slimmed")

    monkeypatch.setattr(PruneHook, "_slim", broken)
    with pytest.raises(ValueError, match="cannot be slimmed"):
        dry_run(long(tmp_path))


def test_the_copy_keeps_batch_size_and_what_is_the_best(tmp_path):
    cfg = long(tmp_path, checkpoint=dict(save_best="accuracy", rule="greater", max_keep_ckpts=1, out_dir="/elsewhere"))
    short = shortened(cfg, "x")
    assert short.train_dataloader.batch_size == 8
    assert short.train_dataloader.sampler == dict(type="mmitp.FewSamples", images=16)
    assert dict(short.default_hooks.checkpoint) == dict(
        type="CheckpointHook",
        save_best="accuracy",
        rule="greater",
        interval=1,
        by_epoch=True,
        filename_tmpl="step_{}.pth",
    )
    assert (short.custom_hooks[0].begin, short.custom_hooks[0].end) == (1, 2)


def test_the_tool(tmp_path, capsys):
    path = Path(__file__).parents[2] / "tools" / "train.py"
    spec = importlib.util.spec_from_file_location("train_tool", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    long(tmp_path / "work").dump(str(tmp_path / "config.py"))
    assert tool.main([str(tmp_path / "config.py"), "--work-dir", str(tmp_path / "work"), "--dry-run"]) == 0
    assert "the same network to the last bit" in capsys.readouterr().out
    assert not os.path.exists(tmp_path / "work")
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(tmp_path / "config.py"), "--dry-run", "--launcher", "slurm"])
    assert "leave --launcher out" in capsys.readouterr().err
