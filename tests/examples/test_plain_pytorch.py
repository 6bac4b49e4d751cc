"""The plain-torch example: runs as it stands, needs no OpenMMLab, and leaves a network that loads without mmitp."""

import re
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plain_pytorch.py"

#: Runs the example where importing any OpenMMLab package fails.
WITHOUT_MM = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmcv", "mmengine", "mmdet", "mmpretrain", "torchvision"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_prunes_slims_and_exports_without_openmmlab(tmp_path):
    out = tmp_path / "small.pt2"
    command = [sys.executable, "-c", WITHOUT_MM, str(EXAMPLE), "--epochs", "4", "--images", "256", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLE.parents[1])
    assert result.returncode == 0, result.stderr[-2000:]
    kept = float(re.search(r"MACs .* \((0\.\d+)\)", result.stdout)[1])
    assert 0.49 <= kept <= 0.5
    dense, small = (
        int(n.replace(",", "")) for n in re.search(r"parameters ([\d,]+) -> ([\d,]+)", result.stdout).groups()
    )
    assert small < 0.7 * dense
    assert torch.export.load(out).module()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_its_own_lines_on_pruning_are_few():
    assert EXAMPLE.read_text().count("# prune") <= 12  # one of them in the docstring
