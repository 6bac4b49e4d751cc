"""Draws of frames: each figure is that of the official evaluation of the drawn multiset."""

import math

import numpy as np
import pytest

from mmitp.evaluation import kitti_bootstrap
from mmitp.evaluation.kitti_ap import CLASSES, Detections, GroundTruth, as_json, evaluate
from mmitp.evaluation.kitti_bootstrap import Draws, bootstrap, difference, draw_frames, interval

NAMES = [*CLASSES, "Van", "Person_sitting", "DontCare", "Tram"]


def random_frames(seed, count=20):
    """Frames of boxes on a coarse grid (so that they meet, tie and are ignored), scores with ties."""
    rng = np.random.default_rng(seed)

    def boxes(number):
        corner = rng.integers(0, 4, (number, 2)) * 30.0
        return np.concatenate([corner, corner + rng.choice([24.0, 26.0, 38.0, 41.0, 50.0], (number, 2))], 1)

    truth, found = [], []
    for _ in range(count):
        n, m = rng.integers(0, 7), rng.integers(0, 12)
        gt_boxes = boxes(n)
        truth.append(
            GroundTruth(
                rng.choice(NAMES, n).tolist(), gt_boxes, rng.choice([0.0, 0.2, 0.4], n), rng.choice([0, 1, 2, 3], n)
            )
        )
        of = rng.integers(0, max(n, 1), m)
        near = gt_boxes[of] + rng.integers(-3, 4, (m, 4)) if n else boxes(m)
        names = [truth[-1].names[i] if n and rng.random() < 0.7 else rng.choice(NAMES) for i in of]
        found.append(Detections(names, np.asarray(near, dtype=float), rng.integers(1, 8, m) / 8))
    return truth, found


@pytest.mark.parametrize(("seed", "overlap"), [(0, None), (1, None), (2, None), (3, 0.4)])
def test_each_draw_is_the_official_evaluation_of_its_frames(seed, overlap):
    truth, found = random_frames(seed)
    times = draw_frames(len(truth), 25, seed)
    drawn = bootstrap(truth, found, times, overlap=overlap)
    some = 0
    for draw, often in enumerate(times):
        chosen = np.repeat(np.arange(len(truth)), often)
        expected = evaluate([truth[i] for i in chosen], [found[i] for i in chosen], overlap=overlap)
        for name, ap in expected.items():
            r11, r40 = ((0.0,) * 3, (0.0,) * 3) if ap is None else (ap.r11, ap.r40)
            np.testing.assert_allclose(drawn[name].r11[draw], r11, rtol=1e-12)
            np.testing.assert_allclose(drawn[name].r40[draw], r40, rtol=1e-12)
            some += sum(value > 0 for value in r40)
    assert some > 25


def test_each_frame_once_gives_the_figures_themselves():
    truth, found = random_frames(9, count=40)
    drawn = bootstrap(truth, found, np.ones((1, 40), dtype=int), ["car"])
    ap = evaluate(truth, found, ["car"])["Car"]
    assert list(drawn) == ["Car"]
    assert (tuple(drawn["Car"].r11[0]), tuple(drawn["Car"].r40[0])) == (ap.r11, ap.r40)


def test_a_draw_has_as_many_frames_and_the_seed_decides():
    times = draw_frames(50, 200, seed=3)
    assert times.shape == (200, 50)
    assert (times.sum(1) == 50).all()
    assert times.mean(0) == pytest.approx(np.ones(50), abs=0.4)
    assert (times == draw_frames(50, 200, seed=3)).all()
    assert (times != draw_frames(50, 200, seed=4)).any()


def test_a_class_without_detections_is_not_evaluated_and_counts_as_nothing_in_a_draw():
    box = np.array([[0.0, 0, 100, 100]])
    car = GroundTruth(["Car"], box, np.zeros(1), np.zeros(1, int))
    found, nothing = Detections(["Car"], box, np.ones(1)), Detections([], np.empty((0, 4)), np.empty(0))
    drawn = bootstrap([car] * 2, [found, nothing], np.array([[2, 0], [0, 2]]), ["Car", "Cyclist"])
    assert drawn["Cyclist"] is None
    # Twice the same perfect frame fills two of 41 slots, the frame without a detection none.
    assert drawn["Car"].r40[:, 0] == pytest.approx([100 / 40, 0])
    assert drawn["Car"].r11[:, 0] == pytest.approx([100 / 11, 0])


def test_the_interval_leaves_a_fortieth_out_at_each_end():
    column = np.arange(41.0)
    assert interval(np.stack([column, -column, np.full(41, np.nan)], 1)) == [
        pytest.approx([1, 39]),
        pytest.approx([-39, -1]),
        [None, None],
    ]
    holed = np.stack([np.append(column, math.nan)] * 3, 1)
    assert interval(holed)[0] == pytest.approx([1, 39])


def test_the_difference_of_a_detector_and_itself_is_zero_in_every_draw():
    truth, found = random_frames(1)
    times = draw_frames(len(truth), 20)
    same = difference(bootstrap(truth, found, times), bootstrap(truth, found, times))
    assert all((draws.r11 == 0).all() and (draws.r40 == 0).all() for draws in same.values())


def test_the_difference_is_paired_and_missing_where_either_is():
    a, b = Draws(np.array([[1.0, 2, 3]]), np.array([[4.0, 5, 6]])), Draws(np.ones((1, 3)), np.ones((1, 3)))
    both = difference({"Car": a, "Cyclist": a, "Pedestrian": None}, {"Car": b, "Cyclist": None, "Pedestrian": b})
    assert (both["Car"].r11.tolist(), both["Car"].r40.tolist()) == ([[0, 1, 2]], [[3, 4, 5]])
    assert (both["Cyclist"], both["Pedestrian"]) == (None, None)


def test_the_table_names_figure_and_interval():
    figures = {"Car": {"R11": [50.0, None, 1.0], "R40": [40.0, 30.0, 20.0]}, "Cyclist": None}
    column = np.arange(41.0)[:, None] * np.ones(3)
    made = kitti_bootstrap.with_intervals(figures, {"Car": Draws(column, -column), "Cyclist": None})
    assert made["Car"]["R40_interval"] == [pytest.approx([-39, -1])] * 3
    lines = kitti_bootstrap.format_table(made, "2D AP (%)", signed=True).splitlines()
    assert lines[1].split() == "Car R11 +50.00 (+1.00 to +39.00) nan (+1.00 to +39.00) +1.00 (+1.00 to +39.00)".split()
    assert lines[3].split() == ["Cyclist", "R11", "-", "-", "-"]


def test_frames_that_do_not_fit_are_refused():
    truth, found = random_frames(0)
    with pytest.raises(ValueError, match=r"\(draws, 20\), a column a frame, got \(1, 11\)"):
        bootstrap(truth, found, np.ones((1, 11), dtype=int))
    with pytest.raises(ValueError, match="at least one frame and one draw"):
        draw_frames(0)


def test_figures_as_json_have_a_difference():
    truth, found = random_frames(1)
    figures = as_json(evaluate(truth, found))
    change = kitti_bootstrap.figures_difference(figures, figures | {"Cyclist": None})
    assert change["Car"] == {"R11": [0, 0, 0], "R40": [0, 0, 0]}
    assert change["Cyclist"] is None
