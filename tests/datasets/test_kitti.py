import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmitp.datasets import KittiDataset
from mmitp.datasets.kitti import seeded_split
from mmitp.datasets.scenes import write_scenes
from mmitp.registry import DATASETS

ROOT = Path(__file__).parents[2]
TAIL = "1.5 1.6 4.0 0 1.65 20 0"
LABELS = f"""Car 0.00 0 0 10 10 30 20 {TAIL}
Van 0.00 0 0 40 10 60 20 {TAIL}
Truck 0.00 0 0 0 10 8 20 {TAIL}
pedestrian 0.40 2 0 31 5 35 20 {TAIL}
Person_sitting 0.00 1 0 36 10 39 20 {TAIL}
Cyclist 0.00 0 0 20 8 26 20 {TAIL}
Tram 0.00 0 0 1 1 9 9 {TAIL}
DontCare -1 -1 -10 50 1 60 4 -1 -1 -1 -1000 -1000 -1000 -10
"""


def _write(root: Path, frames: dict[str, str], suffix: str = ".png") -> Path:
    for folder in ("training/image_2", "training/label_2", "ImageSets"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for frame, labels in frames.items():
        cv2.imwrite(str(root / f"training/image_2/{frame}{suffix}"), np.full((32, 64, 3), 90, np.uint8))
        (root / f"training/label_2/{frame}.txt").write_text(labels)
    (root / "ImageSets/train.txt").write_text("".join(f"{frame}\n" for frame in frames))
    return root


@pytest.fixture
def root(tmp_path):
    return _write(tmp_path / "kitti", {"000003": LABELS, "000007": "", "000011": LABELS.splitlines()[-1] + "\n"})


def _summary(dataset, index=0):
    return [(i["bbox"][0], i["bbox_label"], i["ignore_flag"]) for i in dataset.get_data_info(index)["instances"]]


def test_neighbours_and_dont_care_are_ignored_for_their_classes(root):
    dataset = KittiDataset(data_root=str(root), ann_file="ImageSets/train.txt")
    assert dataset.metainfo["classes"] == ("Pedestrian", "Car", "Cyclist")
    assert _summary(dataset) == [
        (10, 1, 0),
        (40, 1, 1),  # Van, for Car
        (0, 1, 1),  # Truck, for Car
        (31, 0, 0),
        (36, 0, 1),  # Person_sitting, for Pedestrian
        (20, 2, 0),
        (50, -1, 1),  # DontCare, for all
    ]
    info = dataset.get_data_info(0)
    assert (info["img_id"], info["height"], info["width"]) == ("000003", 32, 64)
    assert info["instances"][3] == {
        "bbox": [31, 5, 35, 20],
        "bbox_label": 0,
        "ignore_flag": 0,
        "truncation": 0.4,
        "occlusion": 2,
    }
    assert dataset.get_cat_ids(0) == [1, 0, 2]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("Car",), [(10, 0, 0), (40, 0, 1), (0, 0, 1), (50, -1, 1)]),
        (("Cyclist", "Pedestrian"), [(31, 1, 0), (36, 1, 1), (20, 0, 0), (50, -1, 1)]),
    ],
)
def test_any_subset_of_the_classes_can_be_chosen(root, classes, expected):
    dataset = KittiDataset(data_root=str(root), ann_file="ImageSets/train.txt", metainfo={"classes": classes})
    assert _summary(dataset) == expected
    assert len(dataset.metainfo["palette"]) == len(classes)


def test_test_mode_keeps_frames_without_objects_and_training_may_leave_them_out(root):
    kwargs = {"data_root": str(root), "filter_cfg": {"filter_empty_gt": True}}
    assert len(KittiDataset(**kwargs)) == 1
    assert len(KittiDataset(test_mode=True, **kwargs)) == 3
    assert len(KittiDataset(data_root=str(root))) == 3


def test_images_with_a_smaller_side_can_be_left_out(root):
    cv2.imwrite(str(root / "training/image_2/000007.png"), np.zeros((40, 40, 3), np.uint8))  # the others: 64 x 32
    kwargs = {"data_root": str(root), "filter_cfg": {"min_size": 33}}
    assert [info["img_id"] for info in KittiDataset(**kwargs)] == ["000007"]
    assert len(KittiDataset(**kwargs, test_mode=True)) == 3


def test_a_box_without_area_is_ignored(tmp_path):
    root = _write(tmp_path, {"000000": f"Car 0.00 0 0 10 10 10 20 {TAIL}\n"})
    assert _summary(KittiDataset(data_root=str(root))) == [(10, 1, 1)]


def test_jpeg_images_and_frames_without_labels_are_read(tmp_path):
    root = _write(tmp_path, {"000001": LABELS}, suffix=".jpg")
    dataset = KittiDataset(data_root=str(root), ann_file="ImageSets/train.txt")
    assert dataset.get_data_info(0)["img_path"].endswith("000001.jpg")
    (root / "training").rename(root / "testing")
    test = KittiDataset(data_root=str(root), data_prefix={"img_path": "testing/image_2"}, test_mode=True)
    assert test.get_data_info(0)["instances"] == []


def test_the_seeded_split_is_three_quarters_whatever_the_order():
    frames = [f"{i:06d}" for i in range(7481)]
    train, val = seeded_split(frames, seed=3)
    assert (len(train), len(val)) == (5611, 1870)
    assert sorted(train + val) == frames
    assert seeded_split(frames[::-1], seed=3) == (train, val)
    assert seeded_split(frames, seed=4) != (train, val)


def test_the_data_set_uses_the_seeded_split(tmp_path):
    frames = [f"{i:06d}" for i in range(8)]
    root = _write(tmp_path, dict.fromkeys(frames, ""))
    parts = []
    for split in ("train75", "val25"):
        dataset = KittiDataset(data_root=str(root), split=split, split_seed=1)
        parts.append([dataset.get_data_info(i)["img_id"] for i in range(len(dataset))])
    assert tuple(parts) == seeded_split(frames, 1)
    assert [len(part) for part in parts] == [6, 2]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("split", ["train75", "val25"])
def test_a_seeded_split_of_too_few_frames_is_refused(tmp_path, frames, split):
    root = _write(tmp_path, {f"{i:06d}": LABELS for i in range(frames)})
    with pytest.raises(ValueError, match=rf"'{split}' needs at least 3 frames .*image_2 has {frames}"):
        KittiDataset(data_root=str(root), split=split)


def test_a_filter_or_split_file_that_leaves_nothing_is_refused(root):
    (root / "training/label_2/000003.txt").write_text("")
    with pytest.raises(ValueError, match=r"none of 3 frames: no object of Cyclist"):
        KittiDataset(data_root=str(root), metainfo=dict(classes=("Cyclist",)), filter_cfg=dict(filter_empty_gt=True))
    (root / "ImageSets/train.txt").write_text("\ufeff\r\n")
    with pytest.raises(ValueError, match=r"train\.txt: no frame ids"):
        KittiDataset(data_root=str(root), ann_file="ImageSets/train.txt")


def test_byte_order_marks_and_windows_line_ends_change_nothing(root):
    plain = KittiDataset(data_root=str(root), ann_file="ImageSets/train.txt")
    for path in (*(root / "training/label_2").iterdir(), root / "ImageSets/train.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    marked = KittiDataset(data_root=str(root), ann_file="ImageSets/train.txt")
    assert len(marked) == 3
    assert [marked.get_data_info(i) for i in range(3)] == [plain.get_data_info(i) for i in range(3)]
    (root / "ImageSets/train.txt").write_bytes("000003\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8 text"):
        KittiDataset(data_root=str(root), ann_file="ImageSets/train.txt")


def test_class_names_that_kitti_does_not_have_are_counted_once_a_data_set(root, monkeypatch):
    said = []
    monkeypatch.setattr("mmitp.datasets.kitti.print_log", lambda text, **_: said.append(text))
    KittiDataset(data_root=str(root))
    assert said == []
    for frame, text in (("000003", "Vehicle"), ("000007", "Vehicle"), ("000011", "Caar")):
        (root / f"training/label_2/{frame}.txt").write_text(f"{text} 0.00 0 0 10 10 30 20 {TAIL}\n")
    KittiDataset(data_root=str(root))
    assert len(said) == 1
    assert "label_2: labels of classes that KITTI does not have" in said[0]
    assert "Vehicle (2), Caar (1)" in said[0]


def test_images_of_other_endings_are_told_of(root, monkeypatch):
    said = []
    monkeypatch.setattr("mmitp.datasets.kitti.print_log", lambda text, **how: said.append(text))
    images = root / "training/image_2"
    (images / "Thumbs.db").write_bytes(b"")
    (images / "000003.jpeg").write_bytes(b"")  # beside 000003.png
    KittiDataset(data_root=str(root))
    assert said == []
    (images / "000007.png").rename(images / "000007.PNG")
    (images / "000008.jpeg").write_bytes(b"")
    assert [info["img_id"] for info in KittiDataset(data_root=str(root))] == ["000003", "000011"]
    assert len(said) == 1
    assert "image_2: 2 images are no frames of the data set" in said[0]
    assert ".png or .jpg, the first: 000007.PNG" in said[0]


def test_missing_data_is_named_with_where_it_was_looked_for(root, tmp_path):
    def build(**kwargs):
        return KittiDataset(**{"data_root": str(root), "ann_file": "ImageSets/train.txt", **kwargs})

    with pytest.raises(FileNotFoundError, match=r"nowhere.training.image_2 with KITTI's images.*data/README\.md"):
        build(data_root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no split file .*ImageSets.absent\.txt.*make.scenes"):
        build(ann_file="ImageSets/absent.txt")
    (root / "training/label_2/000007.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the frames of .*train\.txt.*label_2.000007\.txt"):
        build()
    (root / "training/image_2/000003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the frames .*image_2.000003\.png .*\.jpg"):
        build()
    for path in (root / "training/image_2").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no image"):
        build(ann_file="")


def test_a_malformed_label_is_reported_with_file_and_line(root):
    (root / "training/label_2/000011.txt").write_text(LABELS.splitlines()[0] + "\nCar 0.00 0 0 10\n")
    with pytest.raises(ValueError, match=r"000011\.txt, line 2"):
        KittiDataset(data_root=str(root))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"metainfo": {"classes": ("Car", "Tram")}}, "some of Pedestrian, Car, Cyclist"),
        ({"metainfo": {"classes": ("Car", "Car")}}, "each once"),
        ({"split": "train80"}, "train75, val25"),
        ({"split": "val25", "ann_file": "ImageSets/val.txt"}, "not both"),
        ({"split": "val25", "split_seed": None}, "split_seed must be a whole number"),
        ({"metainfo": {"CLASSES": ("Car",)}}, "under 'classes', not 'CLASSES'"),
        ({"data_prefix": {"img": "training/image_2"}}, "data_prefix .* no key 'img', it knows img_path and label_path"),
        ({"data_prefix": {"img_path": "training/image_2", "label": "training/label_2"}}, "no key 'label'"),
        ({"data_prefix": {"label_path": "training/label_2"}}, "no img_path"),
        ({"filter_cfg": {"filter_empty": True}}, "filter_cfg .* no key 'filter_empty', it knows filter_empty_gt"),
        ({"filter_cfg": {"min_size": 33}}, "min_size=33 leaves none of 3 frames"),
    ],
)
def test_wrong_arguments_are_named(root, kwargs, message):
    with pytest.raises(ValueError, match=message):
        KittiDataset(data_root=str(root), **kwargs)


@pytest.fixture(scope="module")
def scene_root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 8, seed=0, size=(320, 96), val_fraction=0.5)


@pytest.fixture
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def _loader(config: str, part: str, root: Path, workers: int = 0):
    import mmdet.datasets  # noqa: F401  registers what the pipeline takes from mmdet

    loader = Config.fromfile(ROOT / "configs/_base_/datasets" / config)[part]
    loader.batch_size = 2
    loader.num_workers, loader.persistent_workers = workers, workers > 0
    loader.dataset.data_root = str(root)
    return Runner.build_dataloader(loader, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_base_config_loads_training_batches_of_generated_scenes(scene_root, mmdet_scope, workers):
    loader = _loader("kitti.py", "train_dataloader", scene_root, workers)
    batches = list(loader)
    assert len(batches) == 2
    seen = set()
    for batch in batches:
        for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
            assert image.shape == (3, 384, 1280)
            assert image.dtype == torch.uint8
            seen.add(sample.img_id)
            boxes, labels = sample.gt_instances.bboxes.tensor, sample.gt_instances.labels
            assert len(boxes) == len(labels)
            assert (labels >= 0).all()
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2:] <= torch.tensor([1280, 384])).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert set(sample.ignored_instances.labels.tolist()) <= {-1, 0, 1, 2}
    assert seen == {"000000", "000002", "000004", "000006"}


def test_the_base_config_keeps_annotations_in_original_pixels_for_validation(scene_root, mmdet_scope):
    loader = _loader("kitti.py", "val_dataloader", scene_root)
    batch = next(iter(loader))
    sample = batch["data_samples"][0]
    assert sample.img_id == "000001"
    assert sample.ori_shape == (96, 320)
    assert sample.scale_factor == (4.0, 4.0)
    expected = [i["bbox"] for i in loader.dataset.get_data_info(0)["instances"] if not i["ignore_flag"]]
    np.testing.assert_allclose(sample.gt_instances.bboxes.tensor.numpy().reshape(-1, 4), np.reshape(expected, (-1, 4)))


def test_the_papers_config_is_cars_on_a_random_split(scene_root, mmdet_scope):
    train = _loader("kitti_car_75_25.py", "train_dataloader", scene_root).dataset
    val = _loader("kitti_car_75_25.py", "val_dataloader", scene_root).dataset
    assert (len(train), len(val)) == (6, 2)
    assert tuple(train.metainfo["classes"]) == ("Car",)
    assert val.test_mode


def test_the_registry_resolves_the_scoped_name(root):
    dataset = DATASETS.build({"type": "mmitp.KittiDataset", "data_root": str(root), "ann_file": "ImageSets/train.txt"})
    assert len(pickle.loads(pickle.dumps(dataset))) == 3


@pytest.mark.parametrize("line", ["../training/image_2/000003", "/etc/passwd", "..\\000003", "a/../000003"])
def test_split_files_cannot_leave_the_data_root(root, line):
    (root / "ImageSets/train.txt").write_text(f"000003\n{line}\n")
    with pytest.raises(ValueError, match=r"ImageSets/train\.txt, line 2: expected one new frame id a line"):
        KittiDataset(data_root=str(root), ann_file="ImageSets/train.txt")
