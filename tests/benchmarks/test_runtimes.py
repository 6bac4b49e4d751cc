"""benchmarks/runtimes.py: files are compared with torch, and timed over the dense one in the same runtime."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("onnxruntime")


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("runtimes")


def test_rows_of_a_network_are_over_its_dense_one(
    runtimes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(file: Path):  # as ncnn, where a file has gathers
        run = runtimes.onnxruntime_of(file)
        return lambda images: [out + 1 for out in run(images)]

    monkeypatch.setattr(runtimes, "MAKERS", dict(onnxruntime=runtimes.onnxruntime_of, ncnn=wrong))
    config = str(ROOT / "configs" / "cifar10" / "resnet20_cifar10_short.py")
    networks = runtimes.drawn("ResNet-20", config, (32, 32))
    assert [network.gathers for network in networks] == [False, False, True, False, True]
    made = []
    for i, network in enumerate(networks[:3]):
        (tmp_path / str(i)).mkdir()
        made.append(runtimes.make(network, tmp_path / str(i)))
    assert all(set(one.run) == {"torch", "onnxruntime"} for one in made)
    images = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)
    whole, gathered = (one.run["onnxruntime"](images)[0] for one in made[1:])
    np.testing.assert_allclose(whole, gathered, rtol=1e-3, atol=1e-4)  # one network, two files
    rows = runtimes.measure(networks[:3], made, rounds=1)
    assert [row[0] for row in rows] == ["ResNet-20, 32x32", "", ""]
    assert rows[0][2] == 1.0
    assert 0.49 < rows[2][2] <= 0.5 < rows[1][2]
    for row in rows:
        torch_ms, onnxruntime_ms, openvino, ncnn = row[3:7]
        assert openvino is ncnn is None
        assert torch_ms.endswith(")")
        assert float(row[7]) < 1e-4
    assert rows[0][3].endswith("(1.00)")
    assert rows[0][4].endswith("(1.00)")
