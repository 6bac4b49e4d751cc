"""Intervals for KITTI's AP, and for the difference of two detectors, by drawing frames with replacement.

A draw is a multiset of frames, as many as there are; its figure is exactly what the official evaluation says of it,
score thresholds chosen anew. Boxes are matched once, not at every draw: matching never crosses frames, and the
thresholds of any draw are scores of true positives of the whole set. So the true and false positives of every frame at
every such score are counted once, and a draw is a weighted sum of them.

Frames of one video resemble each other, so intervals over frames are rather too narrow than too wide. Only numpy is
imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mmitp.evaluation.kitti_ap as kitti_ap
from mmitp.evaluation.kitti_ap import CLASSES, DIFFICULTIES, Detections, GroundTruth

__all__ = [
    "DRAWS",
    "PERCENT",
    "Draws",
    "bootstrap",
    "difference",
    "draw_frames",
    "figures_difference",
    "format_table",
    "interval",
    "with_intervals",
]

DRAWS = 1000
"""How many draws there are by default."""

PERCENT = 95
"""Intervals hold this share of the draws, the same share being left out at both ends."""

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Draws:
    """The figures of one class in every draw.

    Attributes:
        r11: (draws, 3) AP at 11 points, percent, or a difference of two; columns are easy, moderate, hard. A draw
            without a detection of the class, which the official program would not evaluate, counts as 0; one whose
            figure is 0/0 (see :class:`mmitp.evaluation.kitti_ap.ClassAP`) is NaN.
        r40: (draws, 3) the same at 40 points.
    """

    r11: Float64Array
    r40: Float64Array


def draw_frames(frames: int, draws: int = DRAWS, seed: int = 0) -> Int64Array:
    """(draws, frames): how often each frame is in each draw of as many frames with replacement.

    Raises:
        ValueError: no frames, or no draws.
    """
    if frames < 1 or draws < 1:
        raise ValueError(f"a bootstrap needs at least one frame and one draw, got {frames} frames and {draws} draws")
    chosen = np.random.default_rng(seed).integers(frames, size=(draws, frames))
    return np.stack([np.bincount(row, minlength=frames) for row in chosen])


def bootstrap(
    ground_truth: Sequence[GroundTruth],
    detections: Sequence[Detections],
    times: Int64Array,
    classes: str | Sequence[str] = CLASSES,
    overlap: float | None = None,
) -> dict[str, Draws | None]:
    """AP of every draw, equal to :func:`mmitp.evaluation.kitti_ap.evaluate` of the drawn multiset of frames.

    Args:
        ground_truth: one entry a frame.
        detections: one entry a frame, in the same order of frames.
        times: (draws, frames) from :func:`draw_frames`. The same for two detectors makes their figures paired.
        classes: as in :func:`mmitp.evaluation.kitti_ap.evaluate`.
        overlap: as in :func:`mmitp.evaluation.kitti_ap.evaluate`.

    Returns:
        Class name -> figures, or ``None`` for a class that is not evaluated on the whole set.

    Raises:
        ValueError: as :func:`mmitp.evaluation.kitti_ap.evaluate`, or ``times`` of another number of frames.
    """
    names = kitti_ap.chosen_classes(classes)
    if times.ndim != 2 or times.shape[1] != len(ground_truth):
        raise ValueError(f"times must have shape (draws, {len(ground_truth)}), a column a frame, got {times.shape}")
    scene = kitti_ap._flatten(ground_truth, detections, overlap)
    result: dict[str, Draws | None] = {}
    for name in names:
        own = kitti_ap._is_evaluated(scene, name.lower())
        if not own.any():
            result[name] = None
            continue
        figures = [_figures(scene, kitti_ap._case(scene, name.lower(), d), times) for d in range(len(DIFFICULTIES))]
        evaluated = times @ np.bincount(scene.dt_frame[own], minlength=scene.frames) > 0
        r11, r40 = (np.where(evaluated[:, None], np.stack(rule, 1), 0.0) for rule in zip(*figures, strict=True))
        result[name] = Draws(r11, r40)
    return result


def _figures(scene: kitti_ap._Scene, case: kitti_ap._Case, times: Int64Array) -> tuple[Float64Array, Float64Array]:
    """R11 and R40 of every draw at one difficulty, (draws,) each."""
    matched = np.array(kitti_ap._surest_matches(case, scene.scores.tolist()), dtype=np.int64)
    matched = matched[np.argsort(-scene.scores[matched], kind="stable")]
    levels, level = np.unique(-scene.scores[matched], return_inverse=True)
    tp, fp = _counts(scene, case, levels)
    num_gt = times @ np.bincount(scene.gt_frame[case.gt_valid], minlength=scene.frames)
    curves = np.zeros((len(times), kitti_ap._SLOTS))
    for draw, often in enumerate(times):
        total = often[scene.dt_frame[matched]].cumsum()
        if len(total) and total[-1]:
            indices = kitti_ap._threshold_indices(int(total[-1]), int(num_gt[draw]))
            # The i-th true positive of the draw, each counted as often as its frame is drawn.
            at = level[np.searchsorted(total, indices, side="right")]
            curves[draw] = kitti_ap._envelope(tp[at] @ often, fp[at] @ often)
    return kitti_ap._average(curves)


def _counts(scene: kitti_ap._Scene, case: kitti_ap._Case, levels: Float64Array) -> tuple[Int64Array, Int64Array]:
    """True and false positives (levels, frames) at each threshold; ``levels`` are their negatives in rising order."""
    reached = np.searchsorted(levels, -scene.scores, side="left")
    there = np.zeros((scene.frames, len(levels) + 1), dtype=np.int32)
    np.add.at(there, (scene.dt_frame[case.false_positive], reached[case.false_positive]), 1)
    fp = there[:, :-1].cumsum(1, dtype=np.int32)
    tp = np.zeros_like(fp)
    hits, absorbed = kitti_ap._matches_at(case, reached, len(levels))
    for dt, mask in hits:
        tp[scene.dt_frame[dt]] += kitti_ap._bits(mask, len(levels))
    for dt, mask in absorbed:
        fp[scene.dt_frame[dt]] -= kitti_ap._bits(mask, len(levels))
    return np.ascontiguousarray(tp.T), np.ascontiguousarray(fp.T)


def difference(ours: Mapping[str, Draws | None], theirs: Mapping[str, Draws | None]) -> dict[str, Draws | None]:
    """Figures of one detector minus another's in the same draws; ``None`` where either has none."""
    pairs = {name: (draws, theirs[name]) for name, draws in ours.items()}
    return {
        name: None if a is None or b is None else Draws(a.r11 - b.r11, a.r40 - b.r40) for name, (a, b) in pairs.items()
    }


def interval(values: Float64Array) -> list[list[float | None]]:
    """[low, high] of each column of (draws, 3) figures, in percentiles; draws that are NaN are left out.

    ``None`` stands for both ends where every draw is NaN.
    """
    tail = (100 - PERCENT) / 2
    ends: list[list[float | None]] = []
    for column in values.T:
        numbers = column[~np.isnan(column)]
        ends.append(np.percentile(numbers, [tail, 100 - tail]).tolist() if len(numbers) else [None, None])
    return ends


# --------------------------------------------------------------------------------------------------------------------
# Reporting

Figures = Mapping[str, dict[str, Any] | None]
"""``{'Car': {'R11': [easy, moderate, hard], 'R40': [...]}, ...}``, see :func:`mmitp.evaluation.kitti_ap.as_json`."""


def figures_difference(ours: Figures, theirs: Figures) -> dict[str, dict[str, Any] | None]:
    """Figures of the whole set minus another detector's; ``None`` where either has none."""

    def minus(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
        if a is None or b is None:
            return None
        rules = {rule: zip(a[rule], b[rule], strict=True) for rule in ("R11", "R40")}
        return {rule: [None if None in pair else pair[0] - pair[1] for pair in pairs] for rule, pairs in rules.items()}

    return {name: minus(figures, theirs[name]) for name, figures in ours.items()}


def with_intervals(figures: Figures, draws: Mapping[str, Draws | None]) -> dict[str, dict[str, Any] | None]:
    """Figures of the whole set with ``R11_interval`` and ``R40_interval`` added: three pairs [low, high] each."""
    result: dict[str, dict[str, Any] | None] = {}
    for name, values in figures.items():
        own = draws[name]
        if values is None or own is None:
            result[name] = None
        else:
            result[name] = values | {"R11_interval": interval(own.r11), "R40_interval": interval(own.r40)}
    return result


def format_table(figures: Mapping[str, dict[str, Any] | None], title: str, *, signed: bool = False) -> str:
    """A plain-text table of :func:`with_intervals`'s figures: a row a class and rule, '-' where there is none.

    Args:
        figures: what to show.
        title: heads the first column.
        signed: write the sign of positive numbers too, as differences want it.
    """
    sign = "+" if signed else ""
    width = max(12, len(title) + 2)
    rows = [f"{title:<{width}}{'rule':<6}" + "".join(f"{name:>26}" for name in DIFFICULTIES)]
    for name, values in figures.items():
        for rule in ("R11", "R40"):
            cells = ["-"] * len(DIFFICULTIES)
            if values is not None:
                triple = zip(values[rule], values[f"{rule}_interval"], strict=True)
                cells = [_cell(figure, low, high, sign) for figure, (low, high) in triple]
            rows.append(f"{name:<{width}}{rule:<6}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(rows)


def _cell(figure: float | None, low: float | None, high: float | None, sign: str) -> str:
    shown = "nan" if figure is None else f"{figure:{sign}.2f}"
    return shown if low is None else f"{shown} ({low:{sign}.2f} to {high:{sign}.2f})"
