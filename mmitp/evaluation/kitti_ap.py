"""KITTI 2D average precision, equal to the official development kit's.

The rules are those of the C++ program in KITTI's object development kit (Geiger, Lenz and Urtasun, "Are we ready for
autonomous driving? The KITTI vision benchmark suite", CVPR 2012; program of 2017), with its quirks: a precision curve
is indexed by score threshold rather than by recall, so one perfect detection of one object gives R11 = 9.09 and
R40 = 0. ``R11`` is the mean of every fourth of 41 curve slots, ``R40`` (the benchmark's rule since October 2019) the
mean of all but the first.

Only numpy is imported. Boxes are ``(x1, y1, x2, y2)`` in pixels, float64, with no pixel added to a width or a height.
"""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from math import isfinite
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmitp.files import write_whole

__all__ = [
    "CLASSES",
    "DIFFICULTIES",
    "ClassAP",
    "Detections",
    "GroundTruth",
    "as_json",
    "describe_odd",
    "describe_unknown",
    "evaluate",
    "evaluate_folders",
    "format_table",
    "list_frames",
    "read_detections",
    "read_folders",
    "read_ground_truth",
    "read_split",
    "result_folder",
    "unknown_classes",
    "write_detections",
]

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

CLASSES = ("Car", "Pedestrian", "Cyclist")
"""The classes the benchmark evaluates, in its order."""

LABELLED = (*CLASSES, "Van", "Truck", "Person_sitting", "Tram", "Misc", "DontCare")
"""All class names that KITTI's label files have."""

DIFFICULTIES = ("easy", "moderate", "hard")
"""The order of every triple of figures in this module."""

_MIN_OVERLAP = {"car": 0.7, "pedestrian": 0.5, "cyclist": 0.5}
_NEIGHBOUR = {"car": "van", "pedestrian": "person_sitting"}
_MIN_HEIGHT = (40, 25, 25)
_MAX_OCCLUSION = (0, 1, 2)
_MAX_TRUNCATION = (0.15, 0.3, 0.5)
_SLOTS = 41
_LABEL_COLUMNS = 15
# The official program's "nothing found yet": a score that does not exceed it can match no ground truth.
_NO_SCORE = -1e7
# Pairs of boxes whose overlap is computed in one go; bounds the memory at about 100 MB.
_PAIRS_AT_ONCE = 1 << 20

# Pixels. No image has so many, and products of such numbers are finite.
_FARTHEST = 10**9

_VALID, _IGNORED, _ABSENT = 0, 1, -1


@dataclass(frozen=True)
class GroundTruth:
    """The labels of one frame, in the order of its file (matching depends on the order).

    Attributes:
        names: N class names, any case; ``DontCare`` marks a region where a detection is no false positive.
        boxes: (N, 4) pixels, x1 y1 x2 y2.
        truncation: (N,) fraction outside the image, 0 to 1; -1 where unknown.
        occlusion: (N,) 0 fully visible, 1 partly, 2 largely occluded, 3 unknown; -1 for ``DontCare``.
    """

    names: Sequence[str]
    boxes: Float64Array
    truncation: Float64Array
    occlusion: Int64Array


@dataclass(frozen=True)
class Detections:
    """The detections of one frame, in the order of its file (the first wins a tie).

    Attributes:
        names: M class names, any case.
        boxes: (M, 4) pixels, x1 y1 x2 y2.
        scores: (M,) confidences on any one scale, higher is surer.
    """

    names: Sequence[str]
    boxes: Float64Array
    scores: Float64Array


@dataclass(frozen=True)
class ClassAP:
    """The figures of one class; triples are easy, moderate, hard.

    Attributes:
        r11: AP at 11 points, percent. NaN where the official program's is (a sampled slot is 0/0: no true and no
            false positive left at its threshold, which takes a handful of objects to happen).
        r40: AP at 40 points, percent.
        num_gt: ground truths that count.
        precision: (3, 41) the curves, 0 to 1, after taking the maximum from the right; index = score threshold.
    """

    r11: tuple[float, float, float]
    r40: tuple[float, float, float]
    num_gt: tuple[int, int, int]
    precision: Float64Array


# --------------------------------------------------------------------------------------------------------------------
# Files


_OTHER_ENCODINGS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _lines(path: str | os.PathLike[str]) -> list[bytes]:
    """The lines of a text file, whatever editor of whatever system wrote it.

    Line ends may be of any system, and a UTF-8 byte order mark is left out: neither is part of a name.

    Raises:
        ValueError: the file is no UTF-8 or ASCII text.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(_OTHER_ENCODINGS) or b"\0" in data:
        raise ValueError(
            f"{os.fspath(path)} is not UTF-8 text (UTF-16, as some Windows programs write it, or no text at all): "
            "save it as UTF-8"
        )
    return data.removeprefix(codecs.BOM_UTF8).splitlines()


def _rows(
    path: str | os.PathLike[str], what: str, columns: int, used: Callable[[list[float]], tuple[float, ...]]
) -> tuple[list[str], Float64Array]:
    """Class name and used numbers of each line, the latter (N, columns used); blank lines do not count.

    Read as bytes, because C's white space and digits are ASCII while Python's ``str`` knows more of both.
    """
    names: list[str] = []
    table: list[tuple[float, ...]] = []
    for number, line in enumerate(_lines(path), 1):
        name, *numbers = line.split() or [b""]
        if not name:
            continue
        problem = ""
        if len(numbers) != columns - 1:
            problem = f"{len(numbers) + 1} columns where a {what} line has {columns}"
        else:
            try:
                values = list(map(float, numbers))
                if columns == _LABEL_COLUMNS:
                    int(numbers[1])
                # Python alone reads "1_0" as a number.
                if b"_" in line and any(b"_" in token for token in numbers):
                    raise ValueError
            except ValueError:
                problem = "every column after the class name must be a number (a label's occlusion a whole one)"
            else:
                kept = used(values)
                if not all(map(isfinite, kept)):
                    problem = "the numbers of the box and its score or truncation must be finite"
                elif max(map(abs, kept[:4])) > _FARTHEST:
                    problem = f"the box lies more than {_FARTHEST:,} pixels away"
        if problem:
            raise ValueError(f"{os.fspath(path)}, line {number}: {problem}")
        names.append(name.decode("utf-8", "replace"))
        table.append(kept)
    return names, np.array(table, dtype=np.float64)


def read_ground_truth(path: str | os.PathLike[str]) -> GroundTruth:
    """Reads a KITTI label file: 15 columns a line, blank lines allowed, an empty file is a frame without objects.

    Raises:
        ValueError: a line that does not parse; the message has the file and the line number.
        FileNotFoundError: no such file.
    """
    names, table = _rows(path, "label", _LABEL_COLUMNS, itemgetter(3, 4, 5, 6, 0, 1))
    table = table.reshape(-1, 6)
    return GroundTruth(names, table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def read_detections(path: str | os.PathLike[str]) -> Detections:
    """Reads a KITTI result file: 16 columns a line (a label's 15 and the score), blank lines allowed.

    Raises:
        ValueError: a line that does not parse; the message has the file and the line number.
        FileNotFoundError: no such file.
    """
    names, table = _rows(path, "result", _LABEL_COLUMNS + 1, itemgetter(3, 4, 5, 6, 14))
    table = table.reshape(-1, 5)
    return Detections(names, table[:, :4], table[:, 4])


def write_detections(path: str | os.PathLike[str], detections: Detections) -> None:
    """Writes a KITTI result file; the 3D columns get the benchmark's values for "unknown" (-1, -10, -1000).

    Boxes have four decimals, scores as many digits as identify them, so that reading back is exact for boxes rounded
    to four decimals.

    Raises:
        ValueError: a class name with white space or control characters in it, or none, which the format cannot hold.
    """
    for name in set(detections.names):
        if name.split() != [name] or not name.isprintable():
            raise ValueError(f"{os.fspath(path)}: {name!r} cannot be written, KITTI's class names have no white space")
    lines = [
        f"{name} -1 -1 -10 {x1:.4f} {y1:.4f} {x2:.4f} {y2:.4f} -1 -1 -1 -1000 -1000 -1000 -10 {score!r}\n"
        for name, (x1, y1, x2, y2), score in zip(
            detections.names, detections.boxes.tolist(), detections.scores.tolist(), strict=True
        )
    ]
    write_whole(path, "".join(lines), durable=False)


def read_split(path: str | os.PathLike[str]) -> list[str]:
    """Frame ids of a split file, one a line: the names of label and image files without folder and ending.

    Raises:
        ValueError: no ids in the file, one twice, two on a line, or a line that can be no such name; or no UTF-8 text.
        FileNotFoundError: no such file.
    """
    frames: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(_lines(path), 1):
        try:
            frame = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{os.fspath(path)}, line {number}: not UTF-8 text, save the file as UTF-8") from None
        if not frame:
            continue
        if frame in seen or len(frame.split()) != 1 or not frame.isprintable() or "/" in frame or "\\" in frame:
            shown = frame if len(frame) <= 60 else f"{frame[:57]}..."
            raise ValueError(f"{os.fspath(path)}, line {number}: expected one new frame id a line, got {shown!r}")
        seen.add(frame)
        frames.append(frame)
    if not frames:
        raise ValueError(f"{os.fspath(path)}: no frame ids in the split file")
    return frames


def unknown_classes(frames: Iterable[GroundTruth | Detections]) -> Counter[str]:
    """Class names that KITTI does not have (see :data:`LABELLED`), in any case, and how many objects bear each.

    The benchmark's rules make background of such labels and pass over such detections.
    """
    known = {name.lower() for name in LABELLED}
    return Counter(name for frame in frames for name in frame.names if name.lower() not in known)


def describe_unknown(count: Mapping[str, int]) -> str:
    """What :func:`unknown_classes` found, in words that go on from "labels" or "detections"."""
    named = ", ".join(f"{name} ({number})" for name, number in sorted(count.items(), key=lambda item: -item[1])[:10])
    more = f" and {len(count) - 10} more" if len(count) > 10 else ""
    return f"of classes that KITTI does not have count as background: {named}{more}; it has {', '.join(LABELLED)}"


def describe_odd(frames: Iterable[GroundTruth | Detections]) -> list[str]:
    """What the benchmark's rules take without a word, and is hardly meant: a phrase each, as :func:`describe_unknown`.

    A box whose right or lower edge lies before its left or upper one matches nothing; a detection at or below the
    official program's "nothing found yet" can match no ground truth.
    """
    boxes = [np.asarray(frame.boxes, dtype=np.float64).reshape(-1, 4) for frame in frames]
    scores = [frame.scores for frame in frames if isinstance(frame, Detections)]
    turned = sum(int((b[:, 2:] < b[:, :2]).any(1).sum()) for b in boxes)
    low = sum(int((np.asarray(s) <= _NO_SCORE).sum()) for s in scores)
    found = [f"with x2 < x1 or y2 < y1 match nothing: {turned}"] if turned else []
    return found + ([f"with scores of {_NO_SCORE:g} or less match nothing: {low}"] if low else [])


def result_folder(dt_dir: str | os.PathLike[str]) -> Path:
    """``DT_DIR/data``, the layout of a submission, if it exists, else ``DT_DIR`` itself."""
    path = Path(dt_dir)
    return path / "data" if (path / "data").is_dir() else path


def list_frames(gt_dir: str | os.PathLike[str], dt_dir: str | os.PathLike[str]) -> list[str]:
    """The frames of a ground truth folder, every one of which needs a result, and every result a ground truth.

    Raises:
        ValueError: a folder is missing or empty, or the two do not hold the same frames (a split file chooses some).
    """
    gt_path, dt_path = Path(gt_dir), result_folder(dt_dir)
    for path in (gt_path, dt_path):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
    frames = sorted(name[:-4] for name in os.listdir(gt_path) if name.endswith(".txt"))
    if not frames:
        raise ValueError(f"{gt_path} holds no label files (*.txt)")
    results = {name[:-4] for name in os.listdir(dt_path) if name.endswith(".txt")}
    missing = [frame for frame in frames if frame not in results]
    if missing:
        raise ValueError(
            f"{dt_path / (missing[0] + '.txt')} is missing, a frame without detections needs an empty file "
            f"({len(missing)} of {len(frames)} frames have none; give a split file to evaluate some of the frames)"
        )
    # Other text files (lists, statistics) lie beside results; frames are numbered.
    extra = sorted(name for name in results.difference(frames) if name.isdigit())
    if extra:
        raise ValueError(f"{dt_path / (extra[0] + '.txt')} has no label file in {gt_path} ({len(extra)} such results)")
    return frames


# --------------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True)
class _Scene:
    """All frames in flat arrays, and every pair of boxes whose overlap can matter to any class."""

    frames: int
    gt_frame: Int64Array
    gt_name: Int64Array
    gt_height: Float64Array
    truncation: Float64Array
    occlusion: Int64Array
    dt_frame: Int64Array
    dt_name: Int64Array
    dt_height: Float64Array
    dt_left: Float64Array
    scores: Float64Array
    pair_gt: Int64Array
    pair_dt: Int64Array
    pair_iou: Float64Array
    dontcare: Float64Array  # per detection, the largest share of its area that lies in one DontCare box
    codes: Mapping[str, int]  # lower-case class name -> value in gt_name and dt_name
    min_overlap: Mapping[str, float]  # lower-case class name -> what a match has to exceed


def _array(parts: Sequence[object], width: int, what: str) -> Float64Array:
    arrays = [np.asarray(part, dtype=np.float64) for part in parts]
    shape = (0, 4) if width == 4 else (0,)
    flat = np.concatenate([a.reshape(shape) if a.size == 0 else a for a in arrays]) if arrays else np.empty(shape)
    if flat.ndim != len(shape) or flat.shape[1:] != shape[1:]:
        raise ValueError(f"{what} must have shape {'(N, 4)' if width == 4 else '(N,)'} in every frame")
    return flat


def _lengths_agree(frame: int, what: str, *fields: Sized) -> None:
    sizes = [len(field) for field in fields]
    if len(set(sizes)) > 1:
        raise ValueError(f"{what} of frame number {frame}: its fields have different lengths {sizes}")


def _finite(array: Float64Array, counts: Int64Array, what: str) -> None:
    bad = ~np.isfinite(array).all(tuple(range(1, array.ndim)))
    if bad.any():
        frame = int(np.searchsorted(np.cumsum(counts), int(bad.argmax()), side="right"))
        raise ValueError(f"{what} of frame number {frame} are not all finite numbers")


def _flatten(ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], overlap: float | None) -> _Scene:
    if overlap is not None and not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    min_overlap = _MIN_OVERLAP if overlap is None else dict.fromkeys(_MIN_OVERLAP, overlap)
    if len(ground_truth) != len(detections):
        raise ValueError(f"{len(ground_truth)} frames of ground truth but {len(detections)} of detections")
    for i, (gt, dt) in enumerate(zip(ground_truth, detections, strict=True)):
        _lengths_agree(i, "ground truth", gt.names, gt.boxes, gt.truncation, gt.occlusion)
        _lengths_agree(i, "detections", dt.names, dt.boxes, dt.scores)

    codes: dict[str, int] = {name: i for i, name in enumerate((*_MIN_OVERLAP, *_NEIGHBOUR.values(), "dontcare"))}

    def encode(frames: Iterable[Sequence[str]]) -> Int64Array:
        return np.array([codes.get(name.lower(), -1) for names in frames for name in names], dtype=np.int64)

    gt_count = np.array([len(gt.names) for gt in ground_truth], dtype=np.int64)
    dt_count = np.array([len(dt.names) for dt in detections], dtype=np.int64)
    gt_boxes = _array([gt.boxes for gt in ground_truth], 4, "ground truth boxes")
    dt_boxes = _array([dt.boxes for dt in detections], 4, "detection boxes")
    truncation = _array([gt.truncation for gt in ground_truth], 1, "truncation")
    occlusion = _array([gt.occlusion for gt in ground_truth], 1, "occlusion").astype(np.int64)
    scores = _array([dt.scores for dt in detections], 1, "scores")
    _finite(gt_boxes, gt_count, "ground truth boxes")
    _finite(dt_boxes, dt_count, "detection boxes")
    _finite(scores, dt_count, "scores")
    gt_name = encode(gt.names for gt in ground_truth)

    # A ground truth meets the detections of its own frame; pairs come out ordered by ground truth, then detection.
    frame = np.repeat(np.arange(len(gt_count)), gt_count)
    first, partners = (np.cumsum(dt_count) - dt_count)[frame], dt_count[frame]
    partners = np.where(gt_name < 0, 0, partners)
    dontcare = np.zeros(len(dt_boxes))
    dt_area = (dt_boxes[:, 2] - dt_boxes[:, 0]) * (dt_boxes[:, 3] - dt_boxes[:, 1])
    gt_area = (gt_boxes[:, 2] - gt_boxes[:, 0]) * (gt_boxes[:, 3] - gt_boxes[:, 1])
    total = np.cumsum(partners)
    kept: list[tuple[Int64Array, Int64Array, Float64Array]] = []
    start = 0
    while start < len(partners):
        before = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + _PAIRS_AT_ONCE, side="right")))
        rows = np.arange(start, stop)
        gi = np.repeat(rows, partners[start:stop])
        di = np.arange(before, before + len(gi)) - np.repeat(total[start:stop] - partners[start:stop], partners[rows])
        di += first[gi]
        start = stop
        a, b = gt_boxes[gi], dt_boxes[di]
        width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
        height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
        touch = np.flatnonzero((width > 0) & (height > 0))
        gi, di, inter = gi[touch], di[touch], width[touch] * height[touch]
        stuff = gt_name[gi] == codes["dontcare"]
        np.maximum.at(dontcare, di[stuff], inter[stuff] / dt_area[di[stuff]])
        gi, di, inter = gi[~stuff], di[~stuff], inter[~stuff]
        iou = inter / (dt_area[di] + gt_area[gi] - inter)
        enough = iou > min(min_overlap.values())
        kept.append((gi[enough], di[enough], iou[enough]))
    return _Scene(
        frames=len(ground_truth),
        gt_frame=frame,
        gt_name=gt_name,
        gt_height=gt_boxes[:, 3] - gt_boxes[:, 1],
        truncation=truncation,
        occlusion=occlusion,
        dt_frame=np.repeat(np.arange(len(dt_count)), dt_count),
        dt_name=encode(dt.names for dt in detections),
        dt_height=np.abs(dt_boxes[:, 1] - dt_boxes[:, 3]),
        dt_left=dt_boxes[:, 0],
        scores=scores,
        pair_gt=np.concatenate([gi for gi, _, _ in kept]) if kept else np.empty(0, np.int64),
        pair_dt=np.concatenate([di for _, di, _ in kept]) if kept else np.empty(0, np.int64),
        pair_iou=np.concatenate([iou for _, _, iou in kept]) if kept else np.empty(0),
        dontcare=dontcare,
        codes=codes,
        min_overlap=min_overlap,
    )


def _threshold_indices(count: int, num_gt: int) -> list[int]:
    """Which of ``count`` true positives, by falling score, give the thresholds: recall nearest to 0, 1/40, 2/40, ..."""
    last = count - 1
    chosen: list[int] = []
    current = 0.0
    i = 0
    while i <= last:
        # All before num_gt * current - 1.5 are passed over; rounding may be off by one, so the last step is walked.
        i = min(max(i, int(num_gt * current - 1.5) - 1), last)
        while i < last and (i + 2) / num_gt - current < current - (i + 1) / num_gt:
            i += 1
        chosen.append(i)
        # Summed up, not multiplied: the official program's rounding decides some of the comparisons.
        current += 1.0 / (_SLOTS - 1.0)
        i += 1
    assert len(chosen) <= _SLOTS
    return chosen


def _bits(mask: int, bits: int) -> NDArray[np.uint8]:
    """Bit 0, bit 1, ... of a mask as an array of 0 and 1."""
    data = np.frombuffer(mask.to_bytes((bits + 7) // 8, "little"), np.uint8)
    return np.unpackbits(data, count=bits, bitorder="little")


@dataclass(frozen=True)
class _Case:
    """One class at one difficulty: which boxes count, and the pairs that can match, by ground truth and detection."""

    gt_valid: NDArray[np.bool_]
    dt_valid: NDArray[np.bool_]
    false_positive: NDArray[np.bool_]  # detections that are false positives where nothing takes them
    pair_gt: Int64Array
    pair_dt: Int64Array
    pair_iou: Float64Array


def _is_evaluated(scene: _Scene, name: str) -> NDArray[np.bool_]:
    """Which detections make the official program evaluate a lower-case class name."""
    return (scene.dt_name == scene.codes[name]) & (scene.dt_left >= 0)


def _case(scene: _Scene, name: str, difficulty: int) -> _Case:
    min_overlap, min_height = scene.min_overlap[name], _MIN_HEIGHT[difficulty]

    own = scene.gt_name == scene.codes[name]
    beyond = (
        (scene.occlusion > _MAX_OCCLUSION[difficulty])
        | (scene.truncation > _MAX_TRUNCATION[difficulty])
        | (scene.gt_height <= min_height)
    )
    gt_state = np.full(len(own), _ABSENT)
    gt_state[own] = np.where(beyond[own], _IGNORED, _VALID)
    if name in _NEIGHBOUR:
        gt_state[scene.gt_name == scene.codes[_NEIGHBOUR[name]]] = _IGNORED

    # The official program truncates the height to an integer first, which changes no comparison with an integer. It
    # asks the height before the class, so small boxes of every class can absorb a ground truth.
    small = scene.dt_height < min_height
    dt_state = np.where(small, _IGNORED, np.where(scene.dt_name == scene.codes[name], _VALID, _ABSENT))

    keep = (gt_state[scene.pair_gt] != _ABSENT) & (dt_state[scene.pair_dt] != _ABSENT) & (scene.pair_iou > min_overlap)
    return _Case(
        gt_valid=gt_state == _VALID,
        dt_valid=dt_state == _VALID,
        false_positive=(dt_state == _VALID) & (scene.dontcare <= min_overlap),
        pair_gt=scene.pair_gt[keep],
        pair_dt=scene.pair_dt[keep],
        pair_iou=scene.pair_iou[keep],
    )


def _surest_matches(case: _Case, scores: list[float]) -> list[int]:
    """Pass 1: the detections that are true positives when each ground truth takes its surest free candidate."""
    gt_valid, dt_valid = case.gt_valid.tolist(), case.dt_valid.tolist()
    ends = np.flatnonzero(np.diff(case.pair_gt, append=-1)) + 1
    candidates = case.pair_dt.tolist()
    taken: set[int] = set()
    matched: list[int] = []
    start = 0
    for gt, end in zip(case.pair_gt[ends - 1].tolist(), ends.tolist(), strict=True):
        best, best_score = -1, _NO_SCORE
        for dt in candidates[start:end]:
            if scores[dt] > best_score and dt not in taken:
                best, best_score = dt, scores[dt]
        start = end
        if best >= 0:
            taken.add(best)
            if gt_valid[gt] and dt_valid[best]:
                matched.append(best)
    return matched


def _matches_at(
    case: _Case, reached: Int64Array, thresholds: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pass 2 at many thresholds at once: bit k of a mask is threshold k.

    Args:
        case: the class and difficulty.
        reached: per detection the first threshold that its score reaches; they are in descending order.
        thresholds: how many there are.

    Returns:
        (detection, mask) of the true positives, and of those false-positive candidates that some box has taken.
    """
    gt_valid, dt_valid = case.gt_valid.tolist(), case.dt_valid.tolist()
    first = reached.tolist()
    every = (1 << thresholds) - 1
    # Valid detections by falling overlap, then ignored ones, each kind in file order among equals.
    valid = case.dt_valid[case.pair_dt]
    order = np.lexsort((case.pair_dt, np.where(valid, -case.pair_iou, 0.0), case.pair_gt))
    assigned: dict[int, int] = {}
    hits: list[tuple[int, int]] = []
    current, open_at = -1, 0
    for gt, dt in zip(case.pair_gt[order].tolist(), case.pair_dt[order].tolist(), strict=True):
        if gt != current:
            current, open_at = gt, every
        taken = assigned.get(dt, 0)
        found = open_at & (every >> first[dt] << first[dt]) & ~taken
        if found:
            open_at ^= found
            assigned[dt] = taken | found
            if gt_valid[gt] and dt_valid[dt]:
                hits.append((dt, found))
    return hits, [(dt, mask) for dt, mask in assigned.items() if case.false_positive[dt]]


def _envelope(tp: Int64Array, fp: Int64Array) -> Float64Array:
    """The filtered precision curve (41,) from the counts at the thresholds."""
    with np.errstate(invalid="ignore"):
        raw = tp / (tp + fp)
    precision = np.zeros(_SLOTS)
    # A 0/0 stays where it is but is passed over in the maxima to its left, as C++'s max_element does.
    precision[: len(raw)] = np.where(np.isnan(raw), np.nan, np.fmax.accumulate(raw[::-1])[::-1])
    return precision


def _average(precision: Float64Array) -> tuple[Float64Array, Float64Array]:
    """R11 and R40 in percent of curves (N, 41)."""
    return 100 * precision[:, ::4].mean(1), 100 * precision[:, 1:].mean(1)


def _curve(scene: _Scene, name: str, difficulty: int) -> tuple[Float64Array, int]:
    """The filtered precision curve (41,) of one lower-case class name at one difficulty, and the ground truths."""
    case = _case(scene, name, difficulty)
    num_gt = int(case.gt_valid.sum())
    ordered = np.sort(scene.scores[_surest_matches(case, scene.scores.tolist())])[::-1]
    thresholds = ordered[_threshold_indices(len(ordered), num_gt)]
    count = len(thresholds)
    reached = np.searchsorted(-thresholds, -scene.scores, side="left")
    hits, absorbed = _matches_at(case, reached, count)
    tp = np.zeros(count, dtype=np.int64)
    for _, mask in hits:
        tp += _bits(mask, count)
    # False positives: candidates that are there and not assigned.
    fp = np.bincount(reached[case.false_positive], minlength=count + 1)[:count].cumsum()
    for _, mask in absorbed:
        fp -= _bits(mask, count)
    return _envelope(tp, fp), num_gt


def _canonical(name: str) -> str:
    """The benchmark's spelling of an evaluated class; ValueError for any other name."""
    for known in CLASSES:
        if known.lower() == name.lower():
            return known
    raise ValueError(f"{name!r} is not an evaluated class, choose from {', '.join(CLASSES)}")


def chosen_classes(classes: str | Sequence[str]) -> list[str]:
    """Evaluated classes as the benchmark spells them; a string is one class.

    Raises:
        ValueError: an unknown one.
    """
    return [_canonical(name) for name in ([classes] if isinstance(classes, str) else classes)]


def evaluate(
    ground_truth: Sequence[GroundTruth],
    detections: Sequence[Detections],
    classes: str | Sequence[str] = CLASSES,
    overlap: float | None = None,
) -> dict[str, ClassAP | None]:
    """2D AP by the official rules.

    Args:
        ground_truth: one entry a frame.
        detections: one entry a frame, in the same order of frames.
        classes: which of :data:`CLASSES` to evaluate, in any case; a string is one of them.
        overlap: intersection over union that a match has to exceed, for every class, in place of the official 0.7 for
            cars and 0.5 for the others: how much of an AP is lost to loose boxes.

    Returns:
        Class name -> figures, or ``None`` for a class of which there is no detection with x1 >= 0: the official program
        does not evaluate such a class.

    Raises:
        ValueError: frames or fields that do not fit together, boxes or scores that are not finite, an unknown class,
            an overlap outside of [0, 1).
    """
    names = chosen_classes(classes)
    scene = _flatten(ground_truth, detections, overlap)
    result: dict[str, ClassAP | None] = {}
    for name in names:
        key = name.lower()
        if not _is_evaluated(scene, key).any():
            result[name] = None
            continue
        curves, counts = zip(*(_curve(scene, key, d) for d in range(len(DIFFICULTIES))), strict=True)
        precision = np.stack(curves)
        r11, r40 = _average(precision)
        result[name] = ClassAP(
            (float(r11[0]), float(r11[1]), float(r11[2])),
            (float(r40[0]), float(r40[1]), float(r40[2])),
            (int(counts[0]), int(counts[1]), int(counts[2])),
            precision,
        )
    return result


def evaluate_folders(
    gt_dir: str | os.PathLike[str],
    dt_dir: str | os.PathLike[str],
    frames: Sequence[str] | None = None,
    classes: str | Sequence[str] = CLASSES,
    overlap: float | None = None,
) -> dict[str, ClassAP | None]:
    """:func:`evaluate` on folders of KITTI text files.

    Args:
        gt_dir: label files, ``<frame>.txt``.
        dt_dir: result files, ``<frame>.txt``, in the folder itself or in its sub-folder ``data``.
        frames: frame ids (see :func:`read_split`); by default all of ``gt_dir`` (see :func:`list_frames`).
        classes: as in :func:`evaluate`.
        overlap: as in :func:`evaluate`.

    Raises:
        ValueError: a missing file or folder, or a malformed line.
    """
    chosen = list_frames(gt_dir, dt_dir) if frames is None else list(frames)
    return evaluate(*read_folders(gt_dir, dt_dir, chosen), classes, overlap)


def read_folders(
    gt_dir: str | os.PathLike[str], dt_dir: str | os.PathLike[str], frames: Sequence[str]
) -> tuple[list[GroundTruth], list[Detections]]:
    """Labels and results of some frames, in their order.

    Args:
        gt_dir: as in :func:`evaluate_folders`.
        dt_dir: as in :func:`evaluate_folders`.
        frames: frame ids.

    Raises:
        ValueError: a missing file, or a malformed line.
    """
    results = result_folder(dt_dir)
    ground_truth, detections = [], []
    for frame in frames:
        try:
            ground_truth.append(read_ground_truth(os.path.join(gt_dir, f"{frame}.txt")))
            detections.append(read_detections(os.path.join(results, f"{frame}.txt")))
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename} is missing: each frame needs a label file and a result file "
                "(an empty one where nothing was detected)"
            ) from None
    return ground_truth, detections


# --------------------------------------------------------------------------------------------------------------------
# Reporting


def as_json(result: Mapping[str, ClassAP | None]) -> dict[str, dict[str, list[float | None]] | None]:
    """``{'Car': {'R11': [easy, moderate, hard], 'R40': [...]}, ...}`` in percent.

    A class that was not evaluated is null, so is a single figure that is not a number.
    """

    def figures(values: Sequence[float]) -> list[float | None]:
        return [value if isfinite(value) else None for value in values]

    return {
        name: None if ap is None else {"R11": figures(ap.r11), "R40": figures(ap.r40)} for name, ap in result.items()
    }


def format_table(result: Mapping[str, ClassAP | None]) -> str:
    """A plain-text table: a row a class and rule, '-' where the class was not evaluated."""
    rows = [f"{'2D AP (%)':<12}{'rule':<6}" + "".join(f"{name:>10}" for name in DIFFICULTIES)]
    for name, ap in result.items():
        for rule in ("R11", "R40"):
            values = None if ap is None else (ap.r11 if rule == "R11" else ap.r40)
            cells = ["-"] * len(DIFFICULTIES) if values is None else [f"{value:.2f}" for value in values]
            rows.append(f"{name:<12}{rule:<6}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(rows)
