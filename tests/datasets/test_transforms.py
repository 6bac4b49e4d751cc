import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.structures.bbox import HorizontalBoxes

from mmitp.datasets import ScaleShiftCrop
from mmitp.registry import TRANSFORMS


def _results(boxes, shape=(375, 1242), flags=None):
    image = np.zeros((*shape, 3), np.uint8)
    return {
        "img": image,
        "gt_bboxes": HorizontalBoxes(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        "gt_bboxes_labels": np.arange(len(boxes)),
        "gt_ignore_flags": np.zeros(len(boxes), bool) if flags is None else np.array(flags),
    }


def _extent(image):
    rows, columns = np.nonzero(image[..., 0] > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_kitti_is_scaled_by_width_and_cut_at_the_bottom():
    out = ScaleShiftCrop((1280, 384)).transform(_results([[100, 50, 200, 150], [0, 300, 50, 375]]))
    factor = 1280 / 1242
    assert out["img"].shape == (384, 1280, 3)
    assert out["img_shape"] == (384, 1280)
    assert out["scale_factor"] == (factor, factor)
    boxes = out["gt_bboxes"].tensor.numpy()
    np.testing.assert_allclose(boxes[0], np.array([100, 50, 200, 150]) * factor, rtol=1e-6)
    np.testing.assert_allclose(boxes[1], [0, 300 * factor, 50 * factor, 384], rtol=1e-6)  # 386.5 is cut to 384
    # A prediction divided by the scale factor is in the image's own pixels.
    np.testing.assert_allclose(boxes[0] / np.tile(out["scale_factor"], 2), [100, 50, 200, 150], rtol=1e-6)


def test_a_wider_image_is_filled_at_the_bottom():
    results = _results([[0, 0, 100, 50]], shape=(50, 200))
    results["img"][:] = 255
    out = ScaleShiftCrop((100, 40), fill=(7, 8, 9)).transform(results)
    assert (out["img"][:24] == 255).all()
    assert (out["img"][26:] == (7, 8, 9)).all()
    np.testing.assert_allclose(out["gt_bboxes"].tensor.numpy(), [[0, 0, 50, 25]])


def test_an_image_of_the_right_size_is_left_as_it_is():
    results = _results([[3, 4, 9, 11]], shape=(16, 32))
    results["img"][:] = np.random.default_rng(0).integers(0, 256, (16, 32, 3))
    before = results["img"].copy()
    out = ScaleShiftCrop((32, 16)).transform(results)
    np.testing.assert_array_equal(out["img"], before)
    np.testing.assert_array_equal(out["homography_matrix"], np.eye(3))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_boxes_move_with_the_image(seed):
    random.seed(seed)
    box = np.array([80.0, 40.0, 160.0, 90.0])
    results = _results([box], shape=(120, 240))
    results["img"][40:90, 80:160] = 255
    out = ScaleShiftCrop((480, 240), prob=1.0, scale=0.4, shift=0.1).transform(results)
    matrix = out["homography_matrix"]
    factor = out["scale_factor"][0]
    assert 2 / 1.4 - 1e-9 <= factor <= 2 / 0.6 + 1e-9
    assert out["scale_factor"][0] == out["scale_factor"][1] == pytest.approx(matrix[0, 0], rel=1e-6)
    expected = (matrix @ np.array([[box[0], box[2]], [box[1], box[3]], [1, 1]]))[:2].T.reshape(-1)
    clipped = np.clip(expected, 0, [480, 240, 480, 240])
    moved = out["gt_bboxes"].tensor.numpy()
    np.testing.assert_allclose(moved[0], clipped, atol=1e-3)
    np.testing.assert_allclose(_extent(out["img"]), clipped, atol=1.01)
    # the window's centre moves by at most two standard deviations
    centre = np.linalg.inv(matrix) @ [240, 120, 1]
    assert abs(centre[0] - 120) <= 0.2 * 240 + 1e-3
    assert abs(centre[1] - 60) <= 0.2 * 120 + 1e-3


def test_boxes_outside_are_dropped_and_slivers_are_ignored():
    # rows from 384 on are cut away: 1280 -> 1280, so boxes keep their size
    boxes = [[0, 390, 50, 420], [0, 374, 50, 424], [0, 344, 50, 424], [10, 10, 20, 20]]
    out = ScaleShiftCrop((1280, 384)).transform(_results(boxes, shape=(430, 1280), flags=[False, False, False, True]))
    assert out["gt_bboxes_labels"].tolist() == [1, 2, 3]
    assert out["gt_ignore_flags"].tolist() == [True, False, True]  # a fifth, a half; ignored before
    np.testing.assert_allclose(out["gt_bboxes"].tensor.numpy()[0], [0, 374, 50, 384])


def test_perturbations_happen_with_the_given_probability_and_follow_the_seed():
    transform = ScaleShiftCrop((64, 32), prob=0.5)

    def draw(seed):
        random.seed(seed)
        return [transform.transform(_results([], shape=(32, 64)))["homography_matrix"].tolist() for _ in range(200)]

    first = draw(1)
    assert first == draw(1)
    plain = sum(matrix == np.eye(3).tolist() for matrix in first)
    assert 70 < plain < 130
    random.seed(0)
    never = ScaleShiftCrop((64, 32)).transform(_results([], shape=(32, 64)))
    np.testing.assert_array_equal(never["homography_matrix"], np.eye(3))


def test_a_test_draws_no_random_numbers():
    """Without workers it would move the random sequence of the training that it interrupts."""
    before = random.getstate()
    ScaleShiftCrop((64, 32)).transform(_results([], shape=(32, 64)))
    assert random.getstate() == before


def test_images_without_annotations_are_transformed():
    out = TRANSFORMS.build({"type": "mmitp.ScaleShiftCrop", "size": (20, 10)}).transform(
        {"img": np.zeros((10, 40, 3), np.uint8)}
    )
    assert out["img"].shape == (10, 20, 3)
    assert "gt_bboxes" not in out


@pytest.mark.parametrize(
    "kwargs", [{"size": (0, 5)}, {"size": (4,)}, {"size": (4, 4), "prob": 1.5}, {"size": (4, 4), "scale": 1.0}]
)
def test_wrong_arguments_are_errors(kwargs):
    with pytest.raises(ValueError, match=r"size|need"):
        ScaleShiftCrop(**kwargs)
