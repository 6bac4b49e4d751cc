"""Random scenes: the evaluator against the official rules written down as slow loops, box by box."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmitp.evaluation.kitti_ap import CLASSES, Detections, GroundTruth, evaluate

NEIGHBOURS = {"car": "van", "pedestrian": "person_sitting"}
OVERLAP = {"car": 0.7, "pedestrian": 0.5, "cyclist": 0.5}


def overlap(det, other, share_of_det=False):
    width = min(det[2], other[2]) - max(det[0], other[0])
    height = min(det[3], other[3]) - max(det[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    det_area = (det[2] - det[0]) * (det[3] - det[1])
    other_area = (other[2] - other[0]) * (other[3] - other[1])
    return inter / det_area if share_of_det else inter / (det_area + other_area - inter)


def states(frame, cls, level):
    objects, dets = frame
    gt_states, det_states = [], []
    for name, box, truncation, occlusion in objects:
        name = name.lower()
        if name == cls:
            beyond = occlusion > (0, 1, 2)[level] or truncation > (0.15, 0.3, 0.5)[level]
            beyond = beyond or box[3] - box[1] <= (40, 25, 25)[level]
            gt_states.append("ignored" if beyond else "valid")
        else:
            gt_states.append("ignored" if NEIGHBOURS.get(cls) == name else "absent")
    for name, box, _ in dets:
        if int(abs(box[1] - box[3])) < (40, 25, 25)[level]:
            det_states.append("ignored")
        else:
            det_states.append("valid" if name.lower() == cls else "absent")
    return gt_states, det_states


def scores_of_matches(frame, cls, level):
    objects, dets = frame
    gt_states, det_states = states(frame, cls, level)
    assigned, kept = set(), []
    for (_, gt_box, _, _), gt_state in zip(objects, gt_states, strict=True):
        if gt_state == "absent":
            continue
        chosen, chosen_score = None, -10000000
        for j, (_, box, score) in enumerate(dets):
            if det_states[j] == "absent" or j in assigned or overlap(box, gt_box) <= OVERLAP[cls]:
                continue
            if score > chosen_score:
                chosen, chosen_score = j, score
        if chosen is not None:
            assigned.add(chosen)
            if gt_state == det_states[chosen] == "valid":
                kept.append(chosen_score)
    return kept


def count_at(frame, cls, level, threshold):
    objects, dets = frame
    gt_states, det_states = states(frame, cls, level)
    there = [j for j, det in enumerate(dets) if det[2] >= threshold]
    assigned, tp = set(), 0
    for (_, gt_box, _, _), gt_state in zip(objects, gt_states, strict=True):
        if gt_state == "absent":
            continue
        chosen, largest = None, 0.0
        for j in there:
            value = overlap(dets[j][1], gt_box)
            if j in assigned or value <= OVERLAP[cls]:
                continue
            replaceable = chosen is None or det_states[chosen] == "ignored"
            if det_states[j] == "valid" and (value > largest or replaceable):
                chosen, largest = j, value
            elif det_states[j] == "ignored" and chosen is None:
                chosen = j
        if chosen is not None:
            assigned.add(chosen)
            tp += gt_state == det_states[chosen] == "valid"
    fp = 0
    for j in there:
        if det_states[j] == "valid" and j not in assigned:
            regions = (box for name, box, _, _ in objects if name.lower() == "dontcare")
            fp += not any(overlap(dets[j][1], box, share_of_det=True) > OVERLAP[cls] for box in regions)
    return tp, fp


def literal_ap(frames, cls, level):
    num_gt = sum(states(frame, cls, level)[0].count("valid") for frame in frames)
    scores = sorted((score for frame in frames for score in scores_of_matches(frame, cls, level)), reverse=True)
    thresholds, current = [], 0.0
    for i, score in enumerate(scores):
        last = i == len(scores) - 1
        left = (i + 1) / num_gt
        right = left if last else (i + 2) / num_gt
        if right - current < current - left and not last:
            continue
        thresholds.append(score)
        current += 1 / 40
    slots = [0.0] * 41
    for k, threshold in enumerate(thresholds):
        counts = [count_at(frame, cls, level, threshold) for frame in frames]
        tp, fp = sum(c[0] for c in counts), sum(c[1] for c in counts)
        slots[k] = tp / (tp + fp) if tp + fp else math.nan
    for k in range(len(thresholds)):
        # NaN compares false: it stays if it comes first and is passed over otherwise, as in C++.
        for value in slots[k + 1 :]:
            if slots[k] < value:
                slots[k] = value
    return 100 * sum(slots[::4]) / 11, 100 * sum(slots[1:]) / 40


GT_NAMES = st.sampled_from(["Car", "car", "Van", "Pedestrian", "Person_sitting", "Cyclist", "DontCare", "Truck"])
DET_NAMES = st.sampled_from(["Car", "CAR", "Van", "Pedestrian", "Cyclist"])
# Boxes crowd around one place on a coarse grid, so that overlaps tie, chain and hit the limits exactly.
COORDINATE = st.integers(-4, 8).map(lambda i: i * 2.5)
HEIGHT = st.sampled_from([25, 25.5, 26, 30, 39.5, 40, 40.5, 45, 50])
WIDTH = st.sampled_from([20, 25, 30])


@st.composite
def boxes(draw):
    x, y = draw(COORDINATE), draw(COORDINATE)
    return (x, y, x + draw(WIDTH), y + draw(HEIGHT))


OBJECTS = st.lists(
    st.tuples(GT_NAMES, boxes(), st.sampled_from([0, 0, 0.15, 0.2, 0.3, 0.6]), st.sampled_from([0, 0, 1, 2, 3])),
    max_size=6,
)
DETS = st.lists(st.tuples(DET_NAMES, boxes(), st.integers(-2, 6).map(lambda i: i / 4)), max_size=9)
FRAMES = st.lists(st.tuples(OBJECTS, DETS), min_size=1, max_size=5)


def as_arrays(frames):
    ground_truth = [
        GroundTruth(
            [o[0] for o in objects],
            np.array([o[1] for o in objects], dtype=float).reshape(-1, 4),
            np.array([o[2] for o in objects], dtype=float),
            np.array([o[3] for o in objects], dtype=int),
        )
        for objects, _ in frames
    ]
    detections = [
        Detections(
            [d[0] for d in dets],
            np.array([d[1] for d in dets], dtype=float).reshape(-1, 4),
            np.array([d[2] for d in dets], dtype=float),
        )
        for _, dets in frames
    ]
    return ground_truth, detections


@settings(max_examples=300, deadline=None)
@given(FRAMES)
def test_equals_the_literal_rules(frames):
    result = evaluate(*as_arrays(frames))
    for name in CLASSES:
        ap = result[name]
        detected = any(d[0].lower() == name.lower() and d[1][0] >= 0 for _, dets in frames for d in dets)
        assert (ap is not None) == detected
        if ap is None:
            continue
        for level in range(3):
            expected = literal_ap(frames, name.lower(), level)
            assert (ap.r11[level], ap.r40[level]) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(FRAMES, st.sampled_from([0.0, 0.3, 0.5, 0.8]))
def test_equals_the_literal_rules_at_another_overlap(frames, overlap):
    official = dict(OVERLAP)
    try:
        OVERLAP.update(dict.fromkeys(OVERLAP, overlap))
        expected = {name: [literal_ap(frames, name.lower(), level) for level in range(3)] for name in CLASSES}
    finally:
        OVERLAP.update(official)
    for name, ap in evaluate(*as_arrays(frames), overlap=overlap).items():
        for level in range(3) if ap is not None else ():
            assert (ap.r11[level], ap.r40[level]) == pytest.approx(expected[name][level], abs=1e-9, nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(FRAMES, st.randoms(use_true_random=False))
def test_neither_the_order_of_frames_nor_the_scale_of_scores_matters(frames, random):
    changed = [(objects, [(name, box, 8 * score - 3) for name, box, score in dets]) for objects, dets in frames]
    random.shuffle(changed)
    before, after = evaluate(*as_arrays(frames)), evaluate(*as_arrays(changed))
    for name in CLASSES:
        one, other = before[name], after[name]
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            np.testing.assert_array_equal(one.precision, other.precision)


@pytest.mark.parametrize("objects", [60, 500])
def test_many_objects_with_misses_and_errors_equal_the_literal_rules(objects):
    # Enough true positives that thresholds skip scores; found with falling probability as the score falls.
    rng = np.random.default_rng(objects)
    frames = []
    for _ in range(objects // 5):
        things = [("Car", (x, 0.0, x + 100, 100.0), 0.0, int(rng.integers(3))) for x in range(0, 1000, 200)]
        dets = []
        for _, box, _, _ in things:
            for _ in range(rng.integers(3)):
                shift = rng.normal(0, 10, 4)
                dets.append(("Car", tuple(np.add(box, shift)), round(float(rng.random()), 2)))
        frames.append((things, dets))
    ap = evaluate(*as_arrays(frames), ["Car"])["Car"]
    for level in range(3):
        assert (ap.r11[level], ap.r40[level]) == pytest.approx(literal_ap(frames, "car", level), abs=1e-9)
    assert 0 < ap.r40[0] < 100
