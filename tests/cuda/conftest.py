"""Tests on the device against the CPU: marked ``cuda``, skipped where there is none.

``MMITP_CUDA_TESTS_ON=cpu`` runs them on the CPU against itself, to see that nothing in them is mistyped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session")
def device() -> torch.device:
    chosen = os.environ.get("MMITP_CUDA_TESTS_ON", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(chosen)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Float32 means float32 (TF32 keeps ten bits of a product's factors), and a sum comes out the same twice."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        before, matmul.allow_tf32 = matmul.allow_tf32, False
        yield
        matmul.allow_tf32 = before


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of benchmarks/ and the other tests' toy runs, by their plain names."""
    for folder in ("benchmarks", "benchmarks/gpu", "tests/engine", "tests/models"):
        monkeypatch.syspath_prepend(ROOT / folder)
    assert sys.path[0].endswith("models")
