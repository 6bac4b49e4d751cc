"""CenterNet's long run: its schedule in proportion, stopped after an epoch and gone on with, at toy size on the CPU."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed")

from mmitp.engine.config import load_config

ROOT = Path(__file__).parents[2]


def test_the_schedule_is_shortened_in_proportion() -> None:
    kitti_full: Any = importlib.import_module("kitti_full")
    cfg = load_config(str(ROOT / "configs/kitti/centernet_dla34_kitti_prune50.py"))
    assert cfg.train_cfg.max_epochs == kitti_full.WHOLE
    kitti_full.shortened(cfg, 50)
    (hook,) = cfg.custom_hooks
    assert (hook.begin, hook.end) == (3, 40)  # 17 and 200 of 250
    (steps,) = [s.milestones for s in cfg.param_scheduler if "milestones" in s]
    assert steps == [12, 18, 24]  # 60, 90 and 120
    assert cfg.train_cfg.val_interval == 12


@pytest.mark.parametrize("name", ["pruned", "fisher"])
def test_a_run_that_is_told_to_stop_goes_on_after_its_epoch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence: Any = importlib.import_module("evidence")
    kitti_full: Any = importlib.import_module("kitti_full")
    args = argparse.Namespace(epochs=60, data_root="", workers=0, no_amp=False, seed=0)
    part = next(p for p in kitti_full.parts(args) if p.name == name)

    def known() -> dict[str, Any]:
        evidence.work([part], tmp_path / "kitti_full.json", "cpu", dry=True)
        return json.loads((tmp_path / "kitti_full.json").read_text())["parts"][name]

    monkeypatch.setattr(kitti_full, "Told", lambda: SimpleNamespace(now=True))
    first = known()
    assert (first["state"], len(first["curve"])) == ("stopped", 1)
    assert first["error"].startswith("1 of 3 epochs")
    monkeypatch.setattr(kitti_full, "Told", lambda: SimpleNamespace(now=False))
    second = known()
    assert second["state"] == "finished", second.get("error")
    assert [entry["epoch"] for entry in second["curve"]] == [1, 2, 3]
    assert second["curve"][0] == first["curve"][0]
    assert second["ops_kept"] <= 0.5
    assert "3" in second["ap"]
    assert second["minutes_expected"] >= 0


def test_without_frames_it_refuses(tmp_path: Path) -> None:
    evidence: Any = importlib.import_module("evidence")
    kitti_full: Any = importlib.import_module("kitti_full")
    before = signal.getsignal(signal.SIGTERM)
    args = argparse.Namespace(epochs=2, data_root=str(tmp_path), workers=0, no_amp=True, seed=0)
    bench = evidence.Bench("dense", evidence.Evidence(tmp_path / "x.json"), "cpu", False, tmp_path, 1e12)
    try:
        with pytest.raises(ValueError, match="no frames of KITTI"):
            kitti_full.train(bench, "centernet_dla34_kitti", args)
    finally:
        signal.signal(signal.SIGTERM, before)
