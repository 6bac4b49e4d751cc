"""The guide's example on eight photos of noise: trained, slimmed, timed, tested; and the table made of such runs."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet")
from mmengine.registry import MODELS

from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.pruning.check import counted_macs

CONFIGS = Path(__file__).parents[2] / "configs/bccd"
MACS = 957_051_648  # of the dense network at 192x256


@pytest.fixture
def bccd() -> Any:
    return importlib.import_module("bccd")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for i in range(4):
        pixels = draw.integers(80, 160, (96, 128, 3), dtype=np.uint8)
        pixels[20:60, 10 + i : 60 + i] = 0
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", width=128, height=96))
        boxes.append(dict(id=i, image_id=i, category_id=1, bbox=[10 + i, 20, 50, 40], area=2000, iscrowd=0))
    content = dict(
        images=images,
        annotations=boxes,
        categories=[dict(id=i, name=name) for i, name in enumerate(("RBC", "WBC", "Platelets"), 1)],
    )
    for split in ("train", "val", "test"):
        (tmp_path / f"annotations/{split}.json").write_text(json.dumps(content))
    return tmp_path


def test_a_pruned_run_is_slimmed_timed_and_tested_under_attack(bccd: Any, photos: Path, tmp_path: Path) -> None:
    options = [f"{part}_dataloader.dataset.data_root={photos}/" for part in ("train", "val", "test")]
    options += [f"{part}_evaluator.ann_file={photos}/annotations/{part}.json" for part in ("val", "test")]
    options += ["train_cfg.max_epochs=3", "custom_hooks.2.begin=1", "custom_hooks.2.end=2", "log_level=ERROR"]
    args = argparse.Namespace(
        config=str(CONFIGS / "rtmdet_tiny_bccd_prune50.py"),
        seed=3,
        eps=2.0,
        work_dir=str(tmp_path / "run"),
        metrics=str(tmp_path / "figures.json"),
        cfg_options=options,
        data_root=None,
        batches=None,
    )
    bccd.run(args)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["state"] == "finished"
    assert figures["macs_dense"] == MACS
    assert figures["ops_kept"] == pytest.approx(figures["macs"] / MACS)
    assert figures["ops_kept"] <= 0.5
    assert [epoch["epoch"] for epoch in figures["epochs"]] == [1, 2, 3]
    assert min(figures["latency"][key] for key in ("dense_ms", "slimmed_ms")) > 0
    assert figures["latency"]["speed_up"]["rounds"] > 1
    assert figures["test"]["images"] == 4
    assert 0 <= figures["test"]["attacked"][bccd.AP50] <= 100


def test_the_control_has_the_operations_that_its_config_states() -> None:
    cfg = load_config(str(CONFIGS / "rtmdet_tiny_bccd_narrow50.py"))
    model = MODELS.build(cfg.model).eval()
    assert counted_macs(model, blank_example(model, (192, 256))) == 474_545_476 <= MACS / 2
    assert sum(p.numel() for p in model.parameters()) == 2_444_393


def test_a_row_holds_the_means_over_the_finished_seeds(
    bccd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bccd, "RESULTS", tmp_path)
    assert bccd.rows() == ["Not measured yet."]
    for seed, ap, minutes, faster in ((0, 40.0, 10, 2.0), (1, 50.0, 14, 2.5), (2, 99.0, 99, 9.0)):
        figures = dict(
            config="net",
            seed=seed,
            state="trained" if seed == 2 else "finished",
            machine="a CPU",
            shape=[192, 256],
            epochs=[dict(epoch=24)],
            ap=ap + 2,
            train_seconds=60 * minutes,
            macs=5e6,
            ops_kept=0.5,
            params=1000,
            params_kept=0.25,
            latency=dict(dense_ms=20.0, slimmed_ms=8.0 + seed, speed_up=dict(median=faster)),
            test=dict(
                images=72,
                attack="PGD-10",
                eps=2.0,
                clean={bccd.AP: ap, bccd.AP50: ap + 20},
                attacked={bccd.AP: 0.0, bccd.AP50: 6.0},
            ),
        )
        (tmp_path / f"net_s{seed}.json").write_text(json.dumps(figures))
    row = "| [net](../configs/bccd/net.py) | 0, 1 | 24 | 12.0 | 5.0 (0.500) | 1,000 (0.250) | 47.0 "
    assert bccd.rows()[2] == row + "| 45.0 (40.0, 50.0) | 65.0 | 6.0 | 0.45 |"  # between 1 / 2 and 1 / 2.5
