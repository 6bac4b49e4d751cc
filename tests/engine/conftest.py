"""What several of the hooks' tests need: a script run by two processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run_in_two_processes() -> Callable[[Path], None]:
    """Runs a script under torch's launcher, two processes on this machine; fails with the end of what they say."""

    def run(script: Path) -> None:
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths)),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert result.returncode == 0, result.stderr[-3000:]

    return run
