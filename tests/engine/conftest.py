"""What several of the hooks' tests need: a script run by two processes that train together."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

SECONDS = 400


@pytest.fixture
def run_in_two_processes() -> Callable[[Path], None]:
    """Runs a script in two forks of this process, as torch's launcher would start it; fails with what they say.

    A fork has imported everything already. ``tests/test_compat.py`` starts two processes by the launcher itself.
    """

    def run(script: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
        logs = [script.with_suffix(f".{rank}.log") for rank in (0, 1)]
        running = {_fork(script, rank, dict(place, LOCAL_WORLD_SIZE="2"), log): log for rank, log in enumerate(logs)}
        end, failed = time.monotonic() + SECONDS, []
        while running and not failed:
            time.sleep(0.02)
            for pid, status in [os.waitpid(pid, os.WNOHANG) for pid in running]:
                if pid:
                    log = running.pop(pid)
                    failed += [f"{log.name}: {log.read_text()[-3000:]}"] * (status != 0)
            if time.monotonic() > end:
                failed.append(f"not done after {SECONDS} s")
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert not failed, "\n".join(failed)

    return run


def _fork(script: Path, rank: int, environment: dict[str, str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
