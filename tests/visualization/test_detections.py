import cv2
import numpy as np
import pytest

from mmitp.visualization import DrawnBox, detections, draw_side_by_side, save_gt_vs_pred

GREEN, BLUE, GREY = (60, 200, 60), (255, 120, 30), (150, 150, 150)


def _has(image, colour):
    return bool((image == colour).all(axis=-1).any())


def test_ground_truth_is_green_on_the_left_and_predictions_blue_on_the_right():
    image = np.zeros((200, 700, 3), np.uint8)
    picture = draw_side_by_side(
        image,
        [DrawnBox("Car", (100, 60, 200, 120)), DrawnBox("all", (300, 60, 350, 80), ignored=True)],
        [DrawnBox("Car", (400, 60, 500, 120), 0.9), DrawnBox("Car", (10, 60, 90, 120), 0.1)],
    )
    assert picture.shape == (222, 1404, 3)
    left, right = picture[22:, :700], picture[22:, 704:]
    assert _has(left, GREEN)
    assert _has(left, GREY)
    assert not _has(left, BLUE)
    assert _has(right[:, 390:], BLUE)
    assert not _has(right, GREEN)
    assert not right[:, :300].any()  # the score below the threshold is not drawn
    assert not image.any()
    # the box's edges are where they belong
    assert (left[90, [100, 200]] == GREEN).all()
    assert (left[120, 110:190] == GREEN).all()


def test_small_images_are_enlarged():
    picture = draw_side_by_side(np.zeros((96, 320, 3), np.uint8), [DrawnBox("Car", (50, 40, 100, 80))], [])
    assert picture.shape == (22 + 192, 2 * 640 + 4, 3)
    assert (picture[22 + 120, 100] == GREEN).all()


class _Frames:
    metainfo = {"classes": ("Pedestrian", "Car")}  # noqa: RUF012

    def __init__(self, infos):
        self.infos = infos

    def __len__(self):
        return len(self.infos)

    def get_data_info(self, index):
        return self.infos[index]


@pytest.fixture
def frames(tmp_path):
    infos = []
    for i in range(5):
        path = tmp_path / f"{i:06d}.png"
        cv2.imwrite(str(path), np.zeros((100, 640 + 10 * i, 3), np.uint8))
        instances = [
            {"bbox": [10, 30, 60, 80], "bbox_label": 1, "ignore_flag": 0},
            {"bbox": [100, 30, 160, 80], "bbox_label": -1, "ignore_flag": 1},
        ]
        infos.append({"img_id": f"{i:06d}", "img_path": str(path), "instances": instances})
    return _Frames(infos)


def _result(frame):
    instances = {"bboxes": np.array([[300.0, 30, 360, 80]]), "scores": np.array([0.8]), "labels": np.array([1])}
    return {"img_id": frame, "pred_instances": instances}


def test_frames_are_spread_over_the_results(frames, tmp_path):
    out = save_gt_vs_pred(frames, [_result(f"{i:06d}") for i in range(5)], tmp_path / "deep/er/picture.png", n=3)
    picture = cv2.imread(str(out))
    assert picture.shape == (3 * 122, 2 * 680 + 4, 3)  # frames 0, 2 and 4; the widest decides
    assert _has(picture[:122, :640], GREEN)
    assert _has(picture[:122, 644:], BLUE)
    assert (picture[:122, 2 * 640 + 4 :] == 255).all()


def test_data_samples_of_a_detector_are_accepted(frames, tmp_path):
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    sample = DetDataSample(metainfo={"img_id": "000002"})
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor([[300.0, 30, 360, 80]]), scores=torch.tensor([0.8]), labels=torch.tensor([1])
    )
    picture = cv2.imread(str(save_gt_vs_pred(frames, [sample], tmp_path / "p.png")))
    assert picture.shape[0] == 122
    assert _has(picture[:, 664:], BLUE)


def test_boxes_of_a_diverged_network_end_at_the_edge_or_are_left_out():
    image = np.zeros((200, 700, 3), np.uint8)
    odd = [(100, 60, 1e12, 120), (float("-inf"), 60, 90, 120), (float("nan"), 140, 90, 180)]
    picture = draw_side_by_side(image, [], [DrawnBox("Car", box, 0.9) for box in odd])
    right = picture[22:, 704:]
    assert (right[120, [0, 90, 100, 699]] == BLUE).all()
    assert not right[130:].any()


def test_a_label_beyond_the_classes_is_drawn_by_its_number(frames, tmp_path, monkeypatch):
    drawn = []

    def draw(image, truth, predictions, *more):
        drawn.extend(predictions)
        return image

    monkeypatch.setattr(detections, "draw_side_by_side", draw)
    result = _result("000001")
    result["pred_instances"]["labels"] = np.array([2])
    save_gt_vs_pred(frames, [result], tmp_path / "p.png")
    assert [box.name for box in drawn] == ["label 2"]


def test_results_of_other_frames_are_an_error(frames, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        save_gt_vs_pred(frames, [_result("999999")], tmp_path / "p.png")
