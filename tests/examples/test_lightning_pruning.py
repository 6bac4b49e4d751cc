"""The callback for Lightning prunes, slims in mid-training, and resumes from any epoch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="lightning is no dependency of mmitp")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lightning_pruning.py"


def run(out: Path, *more: str) -> tuple[float, int]:
    """Part of the operations kept, and parameters left."""
    command = [sys.executable, str(EXAMPLE), "--epochs", "4", "--images", "256", "--out", str(out), *more]
    result = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLE.parents[1])
    assert result.returncode == 0, result.stderr[-2000:]
    kept = re.search(r"MACs .* \((0\.\d+)\), target 0\.5", result.stdout)
    left = re.search(r"parameters [\d,]+ -> ([\d,]+)", result.stdout)
    assert kept and left, result.stdout
    return float(kept[1]), int(left[1].replace(",", ""))


def test_it_prunes_slims_and_resumes(tmp_path: Path) -> None:
    kept, left = run(tmp_path / "run")
    assert 0.49 <= kept <= 0.5
    for epoch in (0, 1, 2):  # before the window, at its end, with the small network
        (checkpoint,) = (tmp_path / "run").rglob(f"epoch={epoch}.ckpt")
        again = run(tmp_path / f"from{epoch}", "--resume", str(checkpoint))
        assert 0.49 <= again[0] <= 0.5
        if epoch > 0:
            assert again == (kept, left)
