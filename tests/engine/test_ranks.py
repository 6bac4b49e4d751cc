"""A process that stops answering ends the others within the time-out, and they name it."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mmengine.config import Config
from mmengine.hooks import Hook
from toy_config import tiny_config

from mmitp.engine.cli import command
from mmitp.engine.ranks import TIMEOUT, bound_waiting
from mmitp.engine.run import build_runner

SECONDS = 4


class StopsAt(Hook):
    """Stops a process, as a debugger or a full swap would: it is there and does nothing."""

    def __init__(self, rank, iteration):
        self.rank, self.iteration = rank, iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == self.rank and runner.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGSTOP)


def process(rank, port, folder, stopped):
    """A fork that trains as one of two processes; its words go to a file."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)  # pytest's would keep what is said
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT=str(port))

        @command
        def main(argv=None):
            cfg = tiny_config(
                folder / "work", launcher="pytorch", env_cfg=dict(dist_cfg=dict(backend="gloo", timeout=SECONDS))
            )
            runner = build_runner(cfg)
            runner.register_hook(StopsAt(stopped, 7))
            runner.train()

        status = main([])
    except SystemExit as done:
        status = done.code
    finally:
        sys.stderr.flush()
        os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="wants fork")
@pytest.mark.parametrize(
    ("stopped", "says"),
    [(1, "rank 1 does not answer (iterations done: "), (0, "rank 0, at which all processes met, does not answer")],
)
def test_a_stopped_process_is_named_when_the_time_is_up(tmp_path, stopped, says):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [process(rank, port, tmp_path, stopped) for rank in (0, 1)]
    waiting = pids[1 - stopped]
    try:
        until = time.monotonic() + 100
        while time.monotonic() < until:
            done, status = os.waitpid(waiting, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        assert done, (tmp_path / f"{1 - stopped}.log").read_text()[-2000:]
    finally:
        os.kill(pids[stopped], signal.SIGKILL)
        os.waitpid(pids[stopped], 0)
        if not done:
            os.kill(waiting, signal.SIGKILL)
            os.waitpid(waiting, 0)
    said = (tmp_path / f"{1 - stopped}.log").read_text()
    assert os.WEXITSTATUS(status) == 1, said[-2000:]
    assert "Traceback" not in said
    last = [line for line in said.splitlines() if line.startswith("test_ranks.py: ")]
    assert len(last) == 1
    assert says in last[0]
    assert f"env_cfg.dist_cfg.timeout allows ({SECONDS} s)" in last[0]


def test_every_distributed_run_has_a_time_out():
    cfg = Config(dict(launcher="pytorch"))
    bound_waiting(cfg)
    assert cfg.env_cfg.dist_cfg == dict(backend="nccl", timeout=TIMEOUT)
    cfg.env_cfg.dist_cfg.update(backend="gloo", timeout=30)
    bound_waiting(cfg)
    assert cfg.env_cfg.dist_cfg == dict(backend="gloo", timeout=30)
    for bad in (0, -1, float("nan"), "1h", True):
        cfg.env_cfg.dist_cfg.timeout = bad
        with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
            bound_waiting(cfg)
    alone = Config(dict(launcher="none"))
    bound_waiting(alone)
    assert "env_cfg" not in alone
