"""How boxes are compared, and the table of it; mmdeploy itself is not needed."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet")
from mmengine.structures import InstanceData


@pytest.fixture
def script() -> Any:
    return importlib.import_module("mmdeploy_boxes")


def boxes(*rows: tuple[float, ...]) -> InstanceData:
    """x1, y1, x2, y2, score, label each."""
    table = torch.tensor(rows).reshape(-1, 6)
    return InstanceData(bboxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())


def test_a_box_is_found_again_by_its_label_and_its_corners_within_the_image(script: Any) -> None:
    ours = boxes((10, 10, 20, 20, 0.9, 0), (0, 5, 30, 40, 0.5, 1), (50, 50, 60, 60, 0.3, 0), (1, 1, 2, 2, 0.04, 0))
    theirs = boxes(
        (10.005, 10, 20, 20, 0.9, 0),
        (-7, 5, 30, 44, 0.5, 1),  # as ours where the image of 100 x 40 ends
        (50, 50, 60, 60, 0.3, 1),  # another label
    )
    assert script.found_again(theirs, ours, 40, 100) == (2, 3)  # the last of ours has too low a score
    assert script.found_again(boxes((10.02, 10, 20, 20, 0.9, 0)), ours, 40, 100) == (0, 3)
    assert script.found_again(boxes(), ours, 40, 100) == (0, 3)
    assert script.found_again(theirs, boxes(), 40, 100) == (0, 0)


def test_the_table_is_that_of_the_measured_rows(script: Any) -> None:
    committed = json.loads(script.RESULT.read_text(encoding="utf-8"))
    made = script.table(committed["measured"])
    assert made == {key: committed[key] for key in made}
    row = dict(size="1x2", images=3, figure="coco/bbox_mAP", mmdet=0.5, file=0.25, boxes=[1, 4])
    assert script.table({"net": row})["rows"] == [["net", "1x2", 3, 50.0, 25.0, 25.0, None, None]]
    row = dict(row, figure="kitti/Car_R40_moderate", mmdet=50.0, file=25.0, unclipped=30.0, unclipped_boxes=[1, 2])
    assert script.table({"net": row})["rows"] == [["net", "1x2", 3, 50.0, 25.0, 25.0, 30.0, 50.0]]
