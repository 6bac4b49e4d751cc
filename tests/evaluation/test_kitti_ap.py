"""The official rules one by one, on scenes small enough to work out by hand.

Precision at the first threshold (slot 0 of the curve) shows directly what became a true and what a false positive.
"""

import json
import math

import numpy as np
import pytest

from mmitp.evaluation import kitti_ap
from mmitp.evaluation.kitti_ap import ClassAP, Detections, GroundTruth, evaluate

EASY, MODERATE = 0, 1
BOX = (0, 0, 100, 100)


def gt(*objects):
    """A frame of (name, box[, truncation[, occlusion]])."""
    rows = [(*o, 0.0, 0)[:4] if len(o) == 2 else (*o, 0)[:4] for o in objects]
    return GroundTruth(
        [row[0] for row in rows],
        np.array([row[1] for row in rows], dtype=float).reshape(-1, 4),
        np.array([row[2] for row in rows], dtype=float),
        np.array([row[3] for row in rows], dtype=int),
    )


def dt(*objects):
    """A frame of (name, box, score)."""
    return Detections(
        [o[0] for o in objects],
        np.array([o[1] for o in objects], dtype=float).reshape(-1, 4),
        np.array([o[2] for o in objects], dtype=float),
    )


def run(ground_truth, detections, name="Car") -> ClassAP:
    ap = evaluate(ground_truth, detections, [name])[name]
    assert ap is not None
    return ap


def first_precision(ground_truth, detections, name="Car", difficulty=EASY):
    return run(ground_truth, detections, name).precision[difficulty, 0]


# A frame with one car found at score 0.5, to which rules about false positives add another frame.
FOUND_GT, FOUND_DT = gt(("Car", BOX)), dt(("Car", BOX, 0.5))


class TestCurve:
    def test_one_perfect_object_fills_one_slot_of_41(self):
        ap = run([FOUND_GT], [FOUND_DT])
        assert ap.r11 == pytest.approx((100 / 11,) * 3)
        assert ap.r40 == (0, 0, 0)
        assert ap.num_gt == (1, 1, 1)

    @pytest.mark.parametrize(("objects", "r11", "r40"), [(2, 100 / 11, 2.5), (5, 200 / 11, 10), (41, 100, 100)])
    def test_few_perfect_objects_fill_one_slot_each(self, objects, r11, r40):
        ap = run([FOUND_GT] * objects, [dt(("Car", BOX, i / 64)) for i in range(objects)])
        assert ap.r11 == pytest.approx((r11,) * 3)
        assert ap.r40 == pytest.approx((r40,) * 3)

    def test_of_80_true_positives_the_first_and_every_second_give_thresholds(self):
        # Recall steps are 2/80; the first score serves recall 0, and (r + l) / 2 >= current picks 2/80, 4/80, ...
        assert kitti_ap._threshold_indices(80, 80) == [0, *range(1, 80, 2)]

    def test_the_last_true_positive_is_always_a_threshold(self):
        # 3 of 200: recalls 0.005, 0.01, 0.015. The second is skipped (0.015 - 0.025 < 0.025 - 0.01).
        assert kitti_ap._threshold_indices(3, 200) == [0, 2]

    @pytest.mark.parametrize("num_gt", [*range(1, 130), 1993, 10960])
    def test_thresholds_are_those_of_the_official_loop(self, num_gt):
        for count in {1, 2, num_gt // 3, num_gt - 1, num_gt} - {0}:
            expected, current = [], 0.0
            for i in range(count):
                left = (i + 1) / num_gt
                right = (i + 2) / num_gt if i < count - 1 else left
                if right - current < current - left and i < count - 1:
                    continue
                expected.append(i)
                current += 1 / 40
            assert kitti_ap._threshold_indices(count, num_gt) == expected

    def test_precision_is_the_maximum_from_the_right(self):
        # At 0.9 nothing but a true positive; at 0.5 one more and a false one at 0.7; at 0.3 a third.
        ap = run([FOUND_GT] * 3, [dt(("Car", BOX, 0.9), ("Car", (500, 0, 600, 100), 0.7)), FOUND_DT, FOUND_DT])
        assert ap.precision[EASY, :4] == pytest.approx([1, 3 / 4, 3 / 4, 0])

    def test_no_ground_truth_is_zero(self):
        ap = run([gt()], [FOUND_DT])
        assert (ap.r11, ap.r40, ap.num_gt) == ((0, 0, 0), (0, 0, 0), (0, 0, 0))

    def test_no_true_positive_is_zero(self):
        ap = run([FOUND_GT], [dt(("Car", (500, 0, 600, 100), 0.5))])
        assert (ap.r11, ap.r40, ap.num_gt) == ((0, 0, 0), (0, 0, 0), (1, 1, 1))

    def test_missed_ground_truth_lowers_no_precision_but_leaves_slots_empty(self):
        ap = run([FOUND_GT] * 41, [dt(("Car", BOX, i / 64)) for i in range(11)] + [dt()] * 30)
        assert ap.r40[EASY] == pytest.approx(25)

    def test_nothing_left_at_a_threshold_is_not_a_number(self):
        # Pass 1 gives the van the surer detection and the car the other (0.5). At threshold 0.5 the van takes the
        # closer one instead; the surer, too far from the car, lies in the DontCare region: no true, no false positive.
        van, car, region = ("Van", BOX), ("Car", (0, 10, 100, 110)), ("DontCare", (0, -20, 100, 95))
        found = dt(("Car", (0, -10, 100, 90), 0.9), ("Car", (0, 2, 100, 102), 0.5))
        ap = run([gt(van, car, region)], [found])
        assert math.isnan(ap.precision[EASY, 0])
        assert math.isnan(ap.r11[EASY])
        assert ap.r40[EASY] == 0
        assert kitti_ap.as_json({"Car": ap})["Car"]["R11"] == [None, None, None]
        assert first_precision([gt(van, car)], [found]) == 0


class TestGroundTruth:
    @pytest.mark.parametrize(("height", "counted"), [(25, (0, 0, 0)), (25.01, (0, 1, 1)), (40, (0, 1, 1))])
    def test_must_be_higher_than_the_minimum(self, height, counted):
        assert run([gt(("Car", (0, 0, 50, height)))], [FOUND_DT]).num_gt == counted

    def test_occlusion_limits_are_inclusive(self):
        objects = [("Car", BOX, 0.0, occlusion) for occlusion in (-1, 0, 1, 2, 3)]
        assert run([gt(*objects)], [FOUND_DT]).num_gt == (2, 3, 4)

    def test_truncation_limits_are_inclusive(self):
        objects = [("Car", BOX, truncation) for truncation in (-1, 0.15, 0.16, 0.3, 0.31, 0.5, 0.51)]
        assert run([gt(*objects)], [FOUND_DT]).num_gt == (2, 4, 6)

    @pytest.mark.parametrize("beyond", [("Car", BOX, 0.0, 3), ("Car", BOX, 0.6, 0), ("Car", (0, 0, 100, 25), 0.0, 0)])
    def test_beyond_a_limit_it_absorbs_its_detection(self, beyond):
        detections = [FOUND_DT, dt(("Car", beyond[1], 0.9))]
        assert first_precision([FOUND_GT, gt(beyond)], detections, difficulty=MODERATE) == 1
        assert first_precision([FOUND_GT, gt()], detections, difficulty=MODERATE) == 0.5

    @pytest.mark.parametrize(
        ("neighbour", "name", "precision"),
        [
            ("Van", "Car", 1),
            ("Person_sitting", "Pedestrian", 1),
            ("Truck", "Car", 0.5),
            ("Misc", "Car", 0.5),
            ("Van", "Cyclist", 0.5),
            ("Person_sitting", "Cyclist", 0.5),
            ("Person_sitting", "Car", 0.5),
            ("Pedestrian", "Cyclist", 0.5),
            ("Tram", "Pedestrian", 0.5),
        ],
    )
    def test_only_neighbour_classes_absorb_detections(self, neighbour, name, precision):
        ground_truth = [gt((name, BOX)), gt((neighbour, BOX))]
        ap = run(ground_truth, [dt((name, BOX, 0.5)), dt((name, BOX, 0.9))], name)
        assert ap.precision[EASY, 0] == precision
        assert ap.num_gt == (1, 1, 1)

    def test_one_ground_truth_absorbs_one_detection(self):
        assert first_precision([FOUND_GT, gt(("Van", BOX))], [FOUND_DT, dt(*[("Car", BOX, 0.9)] * 3)]) == 1 / 3

    def test_class_names_compare_without_case(self):
        ground_truth = [gt(("cAR", BOX), ("VAN", (200, 0, 300, 100)), ("dontcare", (400, 0, 500, 100)))]
        detections = [dt(*(("CAR", (x, 0, x + 100, 100), 0.5) for x in (0, 200, 400)))]
        assert evaluate(ground_truth, detections, ["car"])["Car"].precision[EASY, 0] == 1


class TestDetections:
    @pytest.mark.parametrize(("name", "exact"), [("Car", 70), ("Pedestrian", 50), ("Cyclist", 50)])
    def test_overlap_must_exceed_the_class_limit(self, name, exact):
        assert run([gt((name, BOX))], [dt((name, (0, 0, 100, exact), 0.5))], name).r11[EASY] == 0
        assert run([gt((name, BOX))], [dt((name, (0, 0, 100, exact + 1), 0.5))], name).r11[EASY] > 0

    @pytest.mark.parametrize(("score", "precision"), [(0.4, 1), (0.5, 0.5), (0.6, 0.5)])
    def test_false_positives_count_from_the_threshold_on(self, score, precision):
        assert first_precision([FOUND_GT, gt()], [FOUND_DT, dt(("Car", BOX, score))]) == precision

    def test_a_second_detection_of_one_object_is_a_false_positive(self):
        assert first_precision([FOUND_GT], [dt(("Car", BOX, 0.5), ("Car", BOX, 0.5))]) == 0.5

    def test_detections_of_another_class_neither_match_nor_count(self):
        assert first_precision([FOUND_GT], [dt(("Van", BOX, 0.9), ("Car", BOX, 0.5), ("Cyclist", BOX, 0.9))]) == 1

    @pytest.mark.parametrize(("height", "precision"), [(39.99, 1), (40, 0.5)])
    def test_too_small_ones_are_no_false_positives(self, height, precision):
        assert first_precision([FOUND_GT, gt()], [FOUND_DT, dt(("Car", (0, 0, 50, height), 0.9))]) == precision

    def test_height_is_taken_without_sign(self):
        assert first_precision([FOUND_GT, gt()], [FOUND_DT, dt(("Car", (0, 100, 100, 0), 0.9))]) == 0.5

    @pytest.mark.parametrize(("height", "r11"), [(39.99, 0), (40, 100 / 11)])
    def test_too_small_one_on_a_valid_object_gives_neither_hit_nor_error(self, height, r11):
        ap = run([gt(("Car", (0, 0, 100, 41)))], [dt(("Car", (0, 0, 100, height), 0.9))])
        assert ap.num_gt[EASY] == 1
        assert ap.r11[EASY] == pytest.approx(r11)

    def test_at_a_threshold_a_too_small_one_is_no_true_positive(self):
        # One car found, one covered by a small box, one false positive: 1 of 2, not 2 of 3.
        ground_truth = [FOUND_GT, gt(("Car", (0, 0, 100, 41))), gt()]
        detections = [FOUND_DT, dt(("Car", (0, 0, 100, 39), 0.9)), dt(("Car", BOX, 0.9))]
        assert first_precision(ground_truth, detections) == 0.5

    def test_a_small_box_of_any_class_can_absorb_an_object(self):
        frame = [gt(("Car", (0, 0, 100, 48)))]
        car = ("Car", (0, 0, 100, 48), 0.5)
        assert run(frame, [dt(("Tram", (0, 0, 100, 39), 0.9), car)]).r11[EASY] == 0
        assert run(frame, [dt(("Tram", (0, 0, 100, 40), 0.9), car)]).r11[EASY] > 0

    def test_the_first_of_equal_scores_wins(self):
        frame = [gt(("Car", (0, 0, 100, 48)))]
        small, car = ("Car", (0, 0, 100, 39), 0.5), ("Car", (0, 0, 100, 48), 0.5)
        assert run(frame, [dt(small, car)]).r11[EASY] == 0
        assert run(frame, [dt(car, small)]).r11[EASY] > 0

    def test_at_a_threshold_a_valid_one_replaces_an_ignored_one_of_larger_overlap(self):
        # Overlaps 39 / 48 and 0.9 * 40 / 48; the second threshold, 0.3, lets both in.
        ground_truth = [gt(("Car", (0, 0, 100, 48))), FOUND_GT]
        small, valid = ("Car", (0, 0, 100, 39), 0.4), ("Car", (0, 0, 90, 40), 0.5)
        for frame in (dt(small, valid), dt(valid, small)):
            ap = run(ground_truth, [frame, dt(("Car", BOX, 0.3))])
            assert ap.precision[EASY, :3].tolist() == [1, 1, 0]

    def test_at_a_threshold_the_largest_overlap_wins(self):
        # Two cars; the surer detection fits both, the other only the first. By overlap both are found; by score the
        # first car would take the surer one and leave the second car without any.
        cars = gt(("Car", BOX), ("Car", (0, 15, 100, 115)))
        both, one = ("Car", (0, 10, 100, 110), 0.5), ("Car", (0, -5, 100, 95), 0.5)
        third = (gt(("Car", BOX)), dt(("Car", BOX, 0.4)))
        ap = run([cars, third[0]], [dt(both, one), third[1]])
        assert ap.precision[EASY, :3].tolist() == [1, 1, 0]

    def test_scores_down_to_minus_ten_million_match(self):
        assert run([FOUND_GT], [dt(("Car", BOX, -9.9e6))]).r11[EASY] > 0
        assert run([FOUND_GT], [dt(("Car", BOX, -1e7))]).r11[EASY] == 0


class TestDontCare:
    @pytest.mark.parametrize(("name", "limit"), [("Car", 70), ("Pedestrian", 50), ("Cyclist", 50)])
    def test_a_detection_inside_by_more_than_the_class_limit_is_no_false_positive(self, name, limit):
        for right, precision in ((limit, 0.5), (limit + 1, 1)):
            ground_truth = [gt((name, BOX)), gt(("DontCare", (-500, 0, right, 500), -1, -1))]
            detections = [dt((name, BOX, 0.5)), dt((name, BOX, 0.9))]
            assert first_precision(ground_truth, detections, name) == precision

    def test_shares_of_two_regions_do_not_add_up(self):
        regions = gt(("DontCare", (0, 0, 50, 100)), ("DontCare", (50, 0, 100, 100)))
        assert first_precision([FOUND_GT, regions], [FOUND_DT, dt(("Car", BOX, 0.9))]) == 0.5

    def test_a_region_takes_any_number_of_detections(self):
        detections = [FOUND_DT, dt(*[("Car", BOX, 0.9)] * 3)]
        assert first_precision([FOUND_GT, gt(("DontCare", BOX))], detections) == 1

    def test_an_object_in_a_region_is_still_found(self):
        ap = run([gt(("DontCare", BOX), ("Car", BOX))], [dt(("Car", BOX, 0.5))])
        assert ap.num_gt == (1, 1, 1)
        assert ap.r11[EASY] > 0


class TestNotEvaluated:
    def test_a_class_without_detections(self):
        assert evaluate([gt(("Car", BOX))], [dt(("Van", BOX, 0.5))]) == dict.fromkeys(kitti_ap.CLASSES)

    @pytest.mark.parametrize(("left", "evaluated"), [(-0.01, False), (0, True)])
    def test_a_class_detected_only_left_of_the_image(self, left, evaluated):
        result = evaluate([FOUND_GT], [dt(("Car", (left, 0, 100, 100), 0.5))], ["Car"])
        assert (result["Car"] is not None) == evaluated

    def test_a_box_left_of_the_image_counts_once_the_class_is_evaluated(self):
        detections = [dt(("Car", (-1, 0, 100, 100), 0.5)), dt(("Car", BOX, 0.1))]
        assert first_precision([FOUND_GT, gt()], detections) == 1

    def test_a_string_is_one_class(self):
        assert list(evaluate([FOUND_GT], [FOUND_DT], "car")) == ["Car"]

    def test_no_frames(self):
        assert evaluate([], [], ["Cyclist"]) == {"Cyclist": None}

    def test_is_null_in_json_and_a_dash_in_the_table(self):
        result = evaluate([FOUND_GT], [FOUND_DT])
        assert json.loads(json.dumps(kitti_ap.as_json(result))) == {
            "Car": {"R11": pytest.approx([100 / 11] * 3), "R40": [0, 0, 0]},
            "Pedestrian": None,
            "Cyclist": None,
        }
        lines = [line.split() for line in kitti_ap.format_table(result).splitlines()]
        assert lines[1:4] == [
            ["Car", "R11", "9.09", "9.09", "9.09"],
            ["Car", "R40", "0.00", "0.00", "0.00"],
            ["Pedestrian", "R11", "-", "-", "-"],
        ]


class TestMistakes:
    def test_unknown_class(self):
        with pytest.raises(ValueError, match=r"'Truck'.*Car, Pedestrian, Cyclist"):
            evaluate([], [], ["Truck"])

    def test_different_numbers_of_frames(self):
        with pytest.raises(ValueError, match="1 frames of ground truth but 2"):
            evaluate([FOUND_GT], [FOUND_DT, FOUND_DT])

    def test_fields_of_different_lengths(self):
        broken = Detections(["Car", "Car"], np.zeros((2, 4)), np.zeros(1))
        with pytest.raises(ValueError, match="detections of frame number 1"):
            evaluate([FOUND_GT] * 2, [FOUND_DT, broken])

    def test_wrong_shape_of_boxes(self):
        with pytest.raises(ValueError, match=r"detection boxes .*\(N, 4\)"):
            evaluate([FOUND_GT], [Detections(["Car"], np.zeros((1, 5)), np.zeros(1))])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_numbers_that_are_not_finite(self, value):
        with pytest.raises(ValueError, match="scores of frame number 1 "):
            evaluate([FOUND_GT] * 2, [FOUND_DT, dt(("Car", BOX, value))])
        with pytest.raises(ValueError, match="ground truth boxes of frame number 2 "):
            evaluate([FOUND_GT, gt(), gt(("Car", (0, 0, value, 1)))], [FOUND_DT] * 3)


LABEL = "Car 0.10 1 1.85 387.63 181.54 423.81 203.12 1.67 1.87 3.69 -16.53 2.39 58.49 1.57"
RESULT = "Car -1 -1 -10 387.63 181.54 423.81 203.12 -1 -1 -1 -1000 -1000 -1000 -10 0.75"


class TestFiles:
    @pytest.mark.parametrize("text", [LABEL, LABEL + "\n", f"\n  {LABEL}  \r\n\n \t\n"])
    def test_label_line(self, tmp_path, text):
        path = tmp_path / "a.txt"
        path.write_bytes(text.encode())
        read = kitti_ap.read_ground_truth(path)
        assert read.names == ["Car"]
        assert read.boxes.tolist() == [[387.63, 181.54, 423.81, 203.12]]
        assert (read.truncation.tolist(), read.occlusion.tolist()) == ([0.1], [1])

    @pytest.mark.parametrize("text", ["", "\n", "  \r\n\n"])
    def test_empty_file_is_a_frame_without_boxes(self, tmp_path, text):
        path = tmp_path / "a.txt"
        path.write_bytes(text.encode())
        assert kitti_ap.read_ground_truth(path).boxes.shape == (0, 4)
        assert kitti_ap.read_detections(path).scores.shape == (0,)

    def test_result_lines_keep_their_order(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text(f"{RESULT}\n{RESULT.replace('0.75', '1e-3').replace('Car', 'Person_sitting')}")
        read = kitti_ap.read_detections(path)
        assert read.names == ["Car", "Person_sitting"]
        assert read.scores.tolist() == [0.75, 0.001]

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (LABEL, "15 columns where a result line has 16"),
            (RESULT + " 1", "17 columns"),
            ("Car", "1 columns"),
            (RESULT.replace("423.81", "x"), "must be a number"),
            (RESULT.replace("0.75", "0,75"), "must be a number"),
            (RESULT.replace("0.75", "1_0"), "must be a number"),
            (RESULT.replace("0.75", "nan"), "must be finite"),
            (RESULT.replace("387.63", "-inf"), "must be finite"),
        ],
    )
    def test_malformed_result_line_is_reported_with_file_and_line(self, tmp_path, line, says):
        path = tmp_path / "000007.txt"
        path.write_text(f"{RESULT}\n\n{line}\n{RESULT}\n")
        with pytest.raises(ValueError, match=rf"000007\.txt, line 3: .*{says}"):
            kitti_ap.read_detections(path)

    @pytest.mark.parametrize(
        "line",
        [RESULT, LABEL[:-5], LABEL.replace(" 1 ", " 0.5 "), LABEL.replace("0.10", "nan"), LABEL.replace("1.57", "?")],
    )
    def test_malformed_label_line_is_reported_with_file_and_line(self, tmp_path, line):
        path = tmp_path / "000007.txt"
        path.write_text(f"{LABEL}\n{line}\n")
        with pytest.raises(ValueError, match=r"000007\.txt, line 2: "):
            kitti_ap.read_ground_truth(path)

    def test_written_results_read_back_exactly(self, tmp_path):
        path = tmp_path / "a.txt"
        scores = [float(np.float32(0.1)), 1e-30, -3.0]
        kitti_ap.write_detections(path, dt(*(("Car", (0, 0.1234, 1e3, 7.7777), score) for score in scores)))
        read = kitti_ap.read_detections(path)
        assert read.boxes.tolist() == [[0, 0.1234, 1e3, 7.7777]] * 3
        assert read.scores.tolist() == scores
        line = path.read_text().splitlines()[2]
        assert line == "Car -1 -1 -10 0.0000 0.1234 1000.0000 7.7777 -1 -1 -1 -1000 -1000 -1000 -10 -3.0"

    def test_class_name_with_white_space_cannot_be_written(self, tmp_path):
        with pytest.raises(ValueError, match="'traffic light' cannot be written"):
            kitti_ap.write_detections(tmp_path / "a.txt", dt(("traffic light", BOX, 0.5)))

    def test_split_file_lists_ids(self, tmp_path):
        path = tmp_path / "val.txt"
        path.write_text("000002\n000001 \n\n")
        assert kitti_ap.read_split(path) == ["000002", "000001"]

    @pytest.mark.parametrize("text", ["", "\n\n"])
    def test_split_file_must_name_frames(self, tmp_path, text):
        path = tmp_path / "val.txt"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"val\.txt: no frame ids"):
            kitti_ap.read_split(path)

    def test_of_a_file_that_is_no_split_a_few_words_are_shown(self, tmp_path):
        (tmp_path / "val.json").write_text('{"images": [' + "1, " * 10_000)
        with pytest.raises(ValueError, match=r"val\.json, line 1: expected one new frame id a line") as error:
            kitti_ap.read_split(tmp_path / "val.json")
        assert len(str(error.value)) < 200 + len(str(tmp_path))

    @pytest.mark.parametrize("text", ["000001\n000001\n", "000001\n000002 000003\n"])
    def test_split_file_has_one_new_id_a_line(self, tmp_path, text):
        path = tmp_path / "val.txt"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"val\.txt, line 2"):
            kitti_ap.read_split(path)


def test_pairs_are_counted_in_portions_of_any_size(monkeypatch):
    """A frame with more pairs than fit into one portion is counted all the same, and to the same curve."""
    rng = np.random.default_rng(0)
    frames, detections = [], []
    for n in (0, 1, 4, 9):
        corners = rng.uniform(0, 60, (n, 2))
        boxes = np.hstack([corners, corners + 100])
        frames.append(gt(*[("Car", tuple(box)) for box in boxes]))
        detections.append(dt(*[("Car", tuple(box + rng.normal(0, 3, 4)), rng.uniform()) for box in boxes]))
    whole = run(frames, detections)
    for portion in (1, 5, 20):
        monkeypatch.setattr(kitti_ap, "_PAIRS_AT_ONCE", portion)
        part = run(frames, detections)
        np.testing.assert_array_equal(part.precision, whole.precision)
        np.testing.assert_array_equal(part.r40, whole.r40)


def test_boxes_narrower_than_a_pixel_overlap():
    narrow = (10.2, 0, 11.0, 100)
    ap = run([gt(("Pedestrian", narrow))], [dt(("Pedestrian", narrow, 0.9))], "Pedestrian")
    assert ap.precision[EASY, 0] == 1
