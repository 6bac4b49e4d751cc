"""Files that are there whole or not at all: on a full disk nothing is left, and what was there stays."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmitp.engine.export import export_checkpoint
from mmitp.engine.results import write_results
from mmitp.files import write_whole

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Meanwhile no file can grow beyond ``size`` bytes, and writing further fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def scenes(folder: Path) -> None:
    from mmitp.datasets.scenes import write_scenes

    write_scenes(folder, 2, size=(160, 64))


def detections(folder: Path) -> None:
    from mmitp.evaluation.kitti_ap import Detections, write_detections

    many = Detections(["Car"] * 40, np.ones((40, 4)), np.ones(40))
    write_detections(folder / "000000.txt", many)


def curve(folder: Path) -> None:
    from mmitp.visualization import plot_budget

    plot_budget([0, 1], [1.0, 0.5], folder / "budget.png")


def converted(folder: Path) -> None:
    from mmitp.models.resnet_cifar import convert_resnet_cifar_file

    source = folder.parent / "source.pth"
    if not source.exists():
        torch.save({"conv1.weight": torch.zeros(16, 3, 3, 3), "linear.weight": torch.zeros(10, 64)}, source)
    convert_resnet_cifar_file(str(source), str(folder / "out.pth"))


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda folder: write_whole(folder / "x.bin", bytes(2000)),
    "text": lambda folder: write_whole(folder / "x.txt", "ü" * 1000, durable=False),
    "results": lambda folder: write_results(folder / "x.json", {"a": list(range(1000))}, {}),
    "scenes": scenes,
    "detections": detections,
    "a curve": curve,
    "converted weights": converted,
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_nothing_half(tmp_path: Path, write: Callable[[Path], object]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "before").mkdir()
    write(tmp_path / "before")  # what libraries keep of their own, such as a list of fonts, is there
    with full_disk(600), pytest.raises(OSError, match="File too large") as refusal:
        write(folder)
    assert str(folder) in str(refusal.value.filename) or refusal.value.filename is None
    assert content(folder) == {}
    write(folder)
    whole = content(folder)
    assert whole
    assert not any(name.endswith(".part") for name in whole)
    with full_disk(600), pytest.raises(OSError, match="File too large"):
        write(folder)
    left = content(folder)
    assert left == {name: whole[name] for name in left}, "a file is torn"
    assert whole.keys() - left.keys() <= {"scenes.json"}  # says that the set is whole, which nobody knows any more


def test_text_is_utf8_with_the_line_ends_it_has(tmp_path: Path) -> None:
    write_whole(tmp_path / "made" / "x.txt", "ü\n\r\n")
    assert (tmp_path / "made" / "x.txt").read_bytes() == b"\xc3\xbc\n\r\n"


@pytest.mark.parametrize("ending", [".pt", ".onnx"])
def test_export_to_a_full_disk_says_so_and_the_interpreter_goes_on(tmp_path: Path, ending: str) -> None:
    """torch's own writer of TorchScript ends the process with an abort."""
    if ending == ".onnx":
        pytest.importorskip("onnxruntime")
    from mmengine.config import Config
    from mmengine.registry import MODELS

    @MODELS.register_module(force=True)
    class WidePoint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4000, 1)

        def forward(self, inputs, data_samples=None, mode="tensor"):  # type: ignore[no-untyped-def]
            return self.conv(inputs)

    torch.save(dict(state_dict=WidePoint().state_dict()), tmp_path / "w.pth")
    cfg = Config(dict(model=dict(type="WidePoint"), default_scope="mmengine"))
    out = tmp_path / f"net{ending}"
    for former in (None, b"former"):
        if former:
            out.write_bytes(former)
        with full_disk(20_000), pytest.raises(OSError, match="File too large"):
            export_checkpoint(cfg, str(tmp_path / "w.pth"), str(out), (4, 4))
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["w.pth", *([out.name] if former else [])])
        assert former is None or out.read_bytes() == former
    assert export_checkpoint(cfg, str(tmp_path / "w.pth"), str(out), (4, 4)).size == os.path.getsize(out)


def test_files_needs_the_standard_library_alone() -> None:
    import subprocess

    code = "import sys, mmitp.files, mmitp.values; print({'torch', 'numpy', 'mmengine'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
