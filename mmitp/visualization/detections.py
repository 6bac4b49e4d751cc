"""Pictures of ground truth beside prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from mmitp.files import write_whole

__all__ = ["DrawnBox", "draw_side_by_side", "save_gt_vs_pred"]

_GREEN, _BLUE, _GREY = (60, 200, 60), (255, 120, 30), (150, 150, 150)  # BGR
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_MIN_WIDTH = 640  # pixels; smaller images are enlarged so that text can be read
_FAR = 20_000  # pixels; OpenCV refuses corners that are too far away


class DrawnBox(NamedTuple):
    """A box to draw: class name, (x1, y1, x2, y2) in the image's pixels, and a score or None."""

    name: str
    box: Sequence[float]
    score: float | None = None
    ignored: bool = False
    """Drawn in grey: a region in which a detection is neither right nor wrong."""


def _panel(image: np.ndarray, boxes: Sequence[DrawnBox], colour: tuple[int, int, int], title: str) -> np.ndarray:
    factor = max(1, -(-_MIN_WIDTH // image.shape[1]))
    panel = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    size = 0.4 if panel.shape[1] < 1000 else 0.5
    for name, box, score, ignored in sorted(boxes, key=lambda b: (not b.ignored, b.score or 0.0)):
        shade = _GREY if ignored else colour
        x1, y1, x2, y2 = (round(min(max(float(value) * factor, -_FAR), _FAR)) for value in box)
        cv2.rectangle(panel, (x1, y1), (x2, y2), shade, 1 if ignored else 2, cv2.LINE_AA)
        text = name if score is None else f"{name} {score:.2f}"
        (width, height), _ = cv2.getTextSize(text, _FONT, size, 1)
        left = min(max(0, x1), max(0, panel.shape[1] - width - 2))
        top = y1 - height - 4 if y1 - height - 4 >= 0 else min(max(0, y1), panel.shape[0] - height - 4)
        cv2.rectangle(panel, (left, top), (left + width + 2, top + height + 4), shade, -1)
        cv2.putText(panel, text, (left + 1, top + height + 1), _FONT, size, (0, 0, 0), 1, cv2.LINE_AA)
    strip = np.full((22, panel.shape[1], 3), 32, np.uint8)
    cv2.putText(strip, title, (6, 16), _FONT, 0.5, colour, 1, cv2.LINE_AA)
    return np.concatenate([strip, panel])


def draw_side_by_side(
    image: np.ndarray,
    ground_truth: Sequence[DrawnBox],
    predictions: Sequence[DrawnBox],
    title: str = "",
    score_threshold: float = 0.3,
) -> np.ndarray:
    """Ground truth in green on the left, predictions in blue on the right, each under a title strip.

    Args:
        image: (H, W, 3) uint8, BGR; left as it is. Images narrower than 640 pixels are enlarged by a whole factor.
        ground_truth: boxes of the left picture; ignored ones are grey.
        predictions: boxes of the right picture; those with a score below the threshold are left out, and those with a
            NaN in the box, as a network that has diverged gives them.
        title: put before "ground truth" and "prediction", e.g. the frame.
        score_threshold: least score drawn.

    Returns:
        uint8 BGR image: two panels of the (enlarged) image's size plus 22 pixels of height, 4 pixels between them.
    """
    kept = [box for box in predictions if box.score is None or box.score >= score_threshold]
    kept = [box for box in kept if not np.isnan(box.box).any()]
    prefix = f"{title}  " if title else ""
    left = _panel(image, ground_truth, _GREEN, f"{prefix}ground truth")
    right = _panel(image, kept, _BLUE, f"{prefix}prediction, score >= {score_threshold:g}")
    gap = np.full((left.shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _field(sample: Any, key: str) -> Any:
    return sample[key] if isinstance(sample, Mapping) else getattr(sample, key)


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def save_gt_vs_pred(
    dataset: Any,
    results: Sequence[Any],
    out_path: str | Path,
    n: int = 6,
    score_threshold: float = 0.3,
) -> Path:
    """Saves one picture of ``n`` frames, ground truth beside prediction, evenly spread over the results.

    Args:
        dataset: a built :class:`~mmitp.datasets.KittiDataset`, or any data set whose ``get_data_info(i)`` has
            ``img_id``, ``img_path`` and ``instances``; its ``metainfo['classes']`` names the labels.
        results: data samples of a detector (or dicts): ``img_id`` and ``pred_instances`` with ``bboxes`` (N, 4) in the
            image's own pixels, ``scores`` (N,) and ``labels`` (N,). A label beyond the classes, as a network with more
            outputs than the data has classes can give it, is drawn by its number.
        out_path: image file to write; its folder is made.
        n: number of frames at most.
        score_threshold: least score drawn.

    Raises:
        ValueError: no results, or none of a frame of the data set; an image that cannot be read.
    """
    frames = {}
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        frames[info["img_id"]] = info
    found = [sample for sample in results if _field(sample, "img_id") in frames]
    if not found or n < 1:
        raise ValueError(f"nothing to draw: {len(results)} results, {len(found)} of the data set's frames, n={n}")
    found.sort(key=lambda sample: str(_field(sample, "img_id")))
    chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(n, len(found))).round().astype(int))]
    classes = list(dataset.metainfo["classes"])
    rows = []
    for sample in chosen:
        info = frames[_field(sample, "img_id")]
        image = cv2.imread(str(info["img_path"]), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"{info['img_path']} cannot be read as an image")
        truth = [
            DrawnBox(
                ("ignored: " if instance["ignore_flag"] else "")
                + (classes[instance["bbox_label"]] if instance["bbox_label"] >= 0 else "all"),
                instance["bbox"],
                ignored=bool(instance["ignore_flag"]),
            )
            for instance in info["instances"]
        ]
        instances = _field(sample, "pred_instances")
        boxes, scores, labels = (_array(_field(instances, key)) for key in ("bboxes", "scores", "labels"))
        predictions = [
            DrawnBox(classes[label] if 0 <= label < len(classes) else f"label {label}", box.tolist(), float(score))
            for box, score, label in zip(boxes, scores, map(int, labels), strict=True)
        ]
        rows.append(draw_side_by_side(image, truth, predictions, str(info["img_id"]), score_threshold))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    path = Path(out_path)
    if not cv2.haveImageWriter(str(path)):
        raise ValueError(f"{path} could not be written as an image")
    write_whole(path, cv2.imencode(path.suffix, np.concatenate(rows))[1].tobytes())
    return path
