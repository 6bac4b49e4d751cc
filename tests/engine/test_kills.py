"""Runs killed by SIGKILL at any moment of their lives resume and end as if nothing had happened, to the last bit.

Thirty-four kills by default; MMITP_KILLS=N spreads N over every kind of run. Each run is a fork of this process: real
processes, real signals, real files.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from mmengine.hooks import Hook
from toy_config import same, tiny_config

import mmitp.engine.hooks.prune_hook as prune_hook
import mmitp.engine.saving as saving
from mmitp.engine.run import build_runner

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills want fork")

ATTACK = dict(type="mmitp.AdversarialHook", eps=8, alpha=10)
KINDS = {
    "fixed b": dict(),
    "slimmed": dict(hook=dict(slim_at_end=True), checkpoint=dict(max_keep_ckpts=2)),
    "everything": dict(
        hook=dict(slim_at_end=True, divisor=2),
        hooks=[dict(type="EMAHook"), ATTACK],
        accumulate=2,
        checkpoint=dict(max_keep_ckpts=1),
    ),
}
EPOCHS, LENGTH = 5, 5


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(Hook):
    """Kills in an iteration: before it, at the optimizer's step, or after it."""

    priority = "LOWEST"

    def __init__(self, iteration, where):
        self.iteration, self.where = iteration, where

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration and self.where == "before":
            die()
        if runner.iter == self.iteration and self.where == "step":
            runner.optim_wrapper.optimizer.register_step_post_hook(lambda *_: die())

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration and self.where == "after":
            die()


def around(owner, name, before):
    """Kills before a function, or after it."""
    call = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            die()
        call(*args, **kwargs)
        die()

    setattr(owner, name, wrapped)


def while_saving(number, part):
    """Kills in the number-th checkpoint: a part of it is written, all but its name is, or the old one is not gone."""
    seen, write = [0], saving.write_whole

    def write_whole(path, content):
        seen[0] += 1
        if seen[0] < number or part == "after":
            write(path, content)
            if seen[0] >= number:
                die()
        elif part == "unnamed":
            os.replace = lambda *_: die()
            write(path, content)
        else:
            Path(f"{path}.part").write_bytes(bytes(content)[: int(len(content) * part)])
            die()

    saving.write_whole = write_whole


def tear_last_checkpoint(number):
    """Kills when ``last_checkpoint`` is opened, and so empty, for the number-th time."""
    import builtins

    import mmengine.hooks.checkpoint_hook as checkpoint_hook

    count = [0]

    def opened(path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)
        if str(path).endswith("last_checkpoint") and "w" in mode:
            count[0] += 1
            if count[0] == number:
                die()
        return file

    checkpoint_hook.open = opened


def train(kind, folder, kill=None, resume=False):
    options = {key: list(value) if key == "hooks" else value for key, value in KINDS[kind].items()}
    runner = build_runner(tiny_config(folder, epochs=EPOCHS, resume=resume, **options))
    how, *arguments = kill or ("no",)
    if how == "iteration":
        runner.register_hook(DieAt(*arguments))
    elif how == "saving":
        while_saving(*arguments)
    elif how == "last":
        tear_last_checkpoint(*arguments)
    elif how == "freeze":
        around(prune_hook.PruneHook, "_freeze", *arguments)
    elif how == "slim":
        around(prune_hook, "slim_runner", *arguments)
    runner.train()


def in_a_process(call, folder, seconds=None):
    """Runs in a fork; returns its exit status, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            call()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def outcome(folder):
    """The last checkpoint, without what differs between any two runs; and the log of every iteration."""
    last = torch.load(folder / f"epoch_{EPOCHS}.pth", weights_only=False)
    state = {key: value for key, value in last.items() if key not in ("meta", "message_hub")}
    lines = {}
    for log in sorted(folder.glob("*/vis_data/scalars.json")):
        for text in log.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut off by the kill
            if "iter" in line:
                lines[line["iter"]] = {key: line[key] for key in ("loss", "ops_kept", "b") if key in line}
    return state, lines


def points(kind, number):
    """Moments of a run's life, the rare ones first, drawn by a fixed seed."""
    draw = random.Random(f"{kind}{number}")
    rare = [("freeze", True), ("freeze", False), ("last", draw.randint(1, 4)), ("saving", 1, 0.5)]
    rare += [("slim", True), ("slim", False)] if "slim_at_end" in KINDS[kind].get("hook", {}) else []
    saves = [0.0, 0.3, 0.9, "unnamed", "after"]
    rare += [("saving", draw.randint(2, EPOCHS - 1), part) for part in saves]
    wheres = ["before", "step", "after"]
    common = []
    while len(rare) + len(common) < number:
        common.append(("iteration", draw.randrange(EPOCHS * LENGTH - 1), draw.choice(wheres)))
        common.append(("clock", draw.uniform(0.1, 0.95)))
    return (rare + common)[:number]


COUNT = int(os.environ.get("MMITP_KILLS", "34"))
SHARES = {"fixed b": COUNT // 3, "slimmed": COUNT // 3, "everything": COUNT - 2 * (COUNT // 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_killed_run_ends_as_the_uninterrupted_one(kind, tmp_path):
    start = time.monotonic()
    assert in_a_process(lambda: train(kind, tmp_path / "whole"), tmp_path / "whole") == 0
    length, whole = time.monotonic() - start, outcome(tmp_path / "whole")
    assert sorted(whole[1]) == list(range(1, EPOCHS * LENGTH + 1))
    failed = []
    for kill in points(kind, SHARES[kind]):
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        seconds = kill[1] * length if kill[0] == "clock" else None
        status = in_a_process(lambda: train(kind, folder, kill), folder, seconds)  # noqa: B023  called at once
        if status != -signal.SIGKILL and not (kill[0] == "clock" and status == 0):
            failed.append((kill, f"was not killed: {status}"))
        elif again := in_a_process(lambda: train(kind, folder, resume=True), folder):  # noqa: B023
            failed.append((kill, again, folder.with_suffix(".log").read_text()[-300:]))
        elif not same(outcome(folder), whole):
            failed.append((kill, "another network, or another log"))
    assert failed == []
