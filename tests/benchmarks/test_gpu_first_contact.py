"""The first minutes on a card, gone through at toy size on the CPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")


@pytest.mark.parametrize("part", ["centernet", "faster_rcnn"])
def test_a_part_runs_and_writes_down_what_it_found(part: str, tmp_path: Path) -> None:
    evidence: Any = importlib.import_module("evidence")
    script: Any = importlib.import_module("first_contact")
    path = tmp_path / "first_contact.json"
    evidence.work([p for p in script.PARTS if p.name == part], path, "cpu", dry=True)
    known = json.loads(path.read_text())["parts"][part]
    assert known["state"] == "finished", known.get("error")
    assert 0.4 < known["ops_kept"] <= 0.5
    if part == "centernet":
        assert list(known["steps_per_second"]) == ["before the window", "in the window", "slimmed"]
    else:
        assert all(0 < loss < float("inf") for loss in known["losses"])
        assert len(known["step_seconds"]) == len(known["detections"]) == 2
