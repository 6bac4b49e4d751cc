"""The Ultralytics example: in-train pruning through their trainer's callbacks, on a data set made here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics", reason="ultralytics (AGPL) is no dependency of mmitp")
pytest.importorskip("PIL")
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "ultralytics_yolo.py"


@pytest.fixture
def data(tmp_path):
    """Grey images with one white square each, in COCO format."""
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for split, count in (("train", 8), ("val", 2)):
        images, boxes = [], []
        for i in range(count):
            name = f"{split}{i}.png"
            picture = Image.new("RGB", (64, 48), (90, 90, 90))
            picture.paste((255, 255, 255), (8 + i, 8, 24 + i, 24))
            picture.save(tmp_path / "images" / name)
            images.append(dict(id=i, file_name=name, width=64, height=48))
            boxes.append(dict(id=i, image_id=i, category_id=7, bbox=[8 + i, 8, 16, 16], area=256, iscrowd=0))
        coco = dict(images=images, annotations=boxes, categories=[dict(id=7, name="square")])
        (tmp_path / f"annotations/{split}.json").write_text(json.dumps(coco))
    return tmp_path


def test_it_prunes_in_training_slims_the_live_network_and_exports(data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLE), str(data), "--epochs", "3", "--imgsz", "64", "--batch", "4", "--out", out]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if "Couldn't load custom C++ ops" in result.stderr:
        pytest.skip("torchvision's compiled operators do not fit this torch, and Ultralytics validates with them")
    assert result.returncode == 0, result.stderr[-2000:]
    assert (out / "data/labels/train/train1.txt").read_text().split() == [
        "0",
        str(17 / 64),
        str(16 / 48),
        str(16 / 64),
        str(16 / 48),
    ]
    figures = json.loads((out / "pruned.json").read_text())
    assert figures["macs"] == figures["macs_of_budget"]
    assert 0.49 <= figures["macs"] / figures["macs_dense"] <= 0.5
    assert figures["gap"] < 1e-4
    assert figures["exported_gap"] < 1e-4
    assert torch.export.load(out / "pruned.pt2").module()(torch.zeros(1, 3, 64, 64)).shape[1] == 5


def test_nothing_of_mmitp_imports_it():
    assert not [p for p in (ROOT / "mmitp").rglob("*.py") if "ultralytics" in p.read_text(encoding="utf-8")]
