"""Classes of the data and of the network, before the first step."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine import Config
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS, DefaultScope, init_default_scope
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from toy_detectors import RETINANET

import mmitp  # noqa: F401
from mmitp import compat
from mmitp.commands.train import main
from mmitp.engine.classes import heads
from mmitp.engine.cli import command
from mmitp.engine.coco_file import fault
from mmitp.engine.run import build_runner

NAMES = ("cup", "plate", "fork")


def annotations(path: Path, names: tuple[str, ...] = NAMES) -> None:
    images = [dict(id=i, file_name=f"{i}.png", width=64, height=64) for i in range(2)]
    boxes = [
        dict(id=i, image_id=i % 2, category_id=i % len(names), bbox=[4, 4, 30, 30], area=900, iscrowd=0)
        for i in range(6)
    ]
    categories = [dict(id=i, name=name) for i, name in enumerate(names)]
    path.write_text(json.dumps(dict(images=images, annotations=boxes, categories=categories)))


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    import cv2

    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((64, 64, 3), 90 * i, np.uint8))
    annotations(tmp_path / "train.json")
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(type="PackDetInputs"),
    ]
    dataset = dict(
        type="CocoDataset",
        data_root=str(tmp_path),
        ann_file="train.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=NAMES),
        pipeline=pipeline,
    )
    loader = dict(batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dataset)
    return Config(
        dict(
            default_scope="mmdet",
            model=copy.deepcopy(RETINANET),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e-4)),
            work_dir=str(tmp_path / "work"),
            experiment_name=tmp_path.name,
        )
    )


def said(cfg: Config) -> str:
    build_runner(cfg).train()
    (log,) = Path(cfg.work_dir).glob("*/*.log")
    return log.read_text()


def test_as_many_outputs_as_classes_pass_without_a_word(cfg: Config) -> None:
    text = said(cfg)
    assert "num_classes" not in text.split("Checkpoints will be saved")[-1]
    assert "has no class" not in text


@pytest.mark.parametrize("wrapped", [False, True])
def test_fewer_outputs_than_classes_are_refused(cfg: Config, wrapped: bool) -> None:
    cfg.model.bbox_head.num_classes = 2
    if wrapped:
        cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.train_dataloader.dataset)
    with pytest.raises(ValueError, match=r"3 classes \(cup, plate, fork\), and model\.bbox_head\.num_classes is 2"):
        build_runner(cfg).train()


def test_more_outputs_than_classes_are_told_of(cfg: Config) -> None:
    cfg.model.bbox_head.num_classes = 8
    assert "model.bbox_head.num_classes is 8: 5 outputs are trained for nothing" in said(cfg)


def test_names_that_the_annotation_file_lacks_are_told_of(cfg: Config, tmp_path: Path) -> None:
    annotations(tmp_path / "train.json", ("cups", "plate", "fork"))
    assert "has no class 'cup', which metainfo.classes names" in (text := said(cfg))
    assert "the nearest is 'cups'" in text


def test_an_annotation_file_with_none_of_the_names_is_refused(cfg: Config, tmp_path: Path) -> None:
    annotations(tmp_path / "train.json", ("a", "b", "c"))
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
    with pytest.raises(ValueError, match="has no class 'cup', 'plate', 'fork'"):
        build_runner(cfg).train()


def test_names_that_no_xml_file_has_are_told_of(
    cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pascal VOC's format: boxes of other names are left out by mmdet without a word."""
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>34</xmax><ymax>34</ymax></bndbox>"
    size = "<size><width>64</width><height>64</height></size>"
    (tmp_path / "train.txt").write_text("0\n1\n")
    data = dict(type="VOCDataset", img_subdir="", ann_subdir="", data_prefix=dict(sub_data_root=""))
    cfg.train_dataloader.dataset.update(data, ann_file="train.txt")

    def write(*names: str) -> None:
        objects = "".join(f"<object><name>{name}</name>{box}</object>" for name in names)
        for i in range(2):
            (tmp_path / f"{i}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
            (tmp_path / f"{i}.jpg").write_bytes((tmp_path / f"{i}.png").read_bytes())

    write("cup", "plate", "Fork")
    assert "train.txt is of class 'fork', which metainfo.classes names" in said(cfg)
    write("Cup", "Plate", "Fork")
    with pytest.raises(ValueError, match=r"no box of .*train\.txt is of class 'cup', 'plate', 'fork'"):
        build_runner(cfg).train()
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
    with pytest.raises(SystemExit, match="2"):
        command(lambda argv: build_runner(cfg).train() and None)([])
    assert "train.txt cannot be built: no image is left in it" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["categories", "images"])
def test_a_broken_annotation_file_is_named(
    cfg: Config, lost: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content: dict[str, Any] = json.loads((tmp_path / "train.json").read_text())
    del content[lost]
    (tmp_path / "train.json").write_text(json.dumps(content))
    cfg.dump(str(tmp_path / "cfg.py"))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "cfg.py"), "--work-dir", str(tmp_path / "work")])
    assert f"'CocoDataset' of {tmp_path}/train.json cannot be built" in capsys.readouterr().err


def _without(content: dict[str, Any], key: str, name: str) -> None:
    for entry in content[key]:
        del entry[name]


BROKEN: dict[str, Any] = {
    "annotations[0] has no 'area'": lambda c: _without(c, "annotations", "area"),
    "images[0] has no 'width'": lambda c: _without(c, "images", "width"),
    "it has no list 'categories'": lambda c: c.pop("categories"),
    "annotations[0].bbox must be four numbers": lambda c: c["annotations"][0].update(bbox=["1", "2", "3", "4"]),
    "it has no annotations": lambda c: c.update(annotations=[]),
    "it has no images": lambda c: c.update(images=[], annotations=[]),
    "none of the classes cup, plate, fork": lambda c: [k.update(name=k["name"].upper()) for k in c["categories"]],
    "annotations[0].category_id is '0'": lambda c: [
        b.update(category_id=str(b["category_id"])) for b in c["annotations"]
    ],
    "annotations[0].image_id is 'a0'": lambda c: [b.update(image_id=f"a{b['image_id']}") for b in c["annotations"]],
}


def test_what_is_wrong_with_an_annotation_file_is_said(
    cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.json"
    whole = file.read_text()
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
    assert fault(str(file), NAMES) == ""

    def refused(text: str | bytes) -> str:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(SystemExit, match="2"):
            command(lambda argv: DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset)) and None)([])
        return capsys.readouterr().err

    init_default_scope("mmdet")
    for says, change in BROKEN.items():
        content = json.loads(whole)
        change(content)
        said = refused(json.dumps(content))
        assert says in said
        assert f"'CocoDataset' of {file} cannot be built: " in said
    assert "no JSON in UTF-8 (without a byte order mark)" in refused(b"\xef\xbb\xbf" + whole.encode())
    assert "no JSON in UTF-8" in refused(whole.encode("utf-16"))
    assert "it holds a list" in refused(f"[{whole}]")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("fork", "cup", "plate"), r"label 0 is 'cup' by .*train\.json and 'fork' by .*val\.json: mmdet numbers"),
        (("cup", "fork"), r"label 1 is 'plate' by .*train\.json and 'fork' by .*val\.json"),
        (("cup", "plate"), r"label 2 is 'fork' by .*train\.json and no class by .*val\.json"),
        (("cup", "plate", "fork", "other"), None),
    ],
)
def test_labels_that_mean_other_classes_in_the_validation_are_refused(
    cfg: Config, names: tuple[str, ...], says: str | None, tmp_path: Path
) -> None:
    annotations(tmp_path / "val.json", names)
    cfg.val_dataloader = copy.deepcopy(cfg.train_dataloader)
    cfg.val_dataloader.dataset.update(ann_file="val.json", test_mode=True)
    cfg.val_evaluator = dict(type="CocoMetric", ann_file=str(tmp_path / "val.json"), metric="bbox")
    cfg.val_cfg = dict(type="ValLoop")
    runner = build_runner(cfg)
    runner.val_loop  # noqa: B018 - builds it
    if says is None:
        runner.call_hook("before_train")
    else:
        with pytest.raises(ValueError, match=says):
            runner.call_hook("before_train")


def test_joined_data_sets_have_one_order_of_classes(cfg: Config, tmp_path: Path) -> None:
    annotations(tmp_path / "more.json", ("plate", "cup"))
    datasets = [cfg.train_dataloader.dataset, dict(cfg.train_dataloader.dataset, ann_file="more.json")]
    cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=datasets)
    with pytest.raises(ValueError, match=r"label 0 is 'cup' by .*train\.json and 'plate' by .*more\.json"):
        build_runner(cfg).train()


def test_a_test_file_of_another_order_is_told_of(cfg: Config, tmp_path: Path) -> None:
    annotations(tmp_path / "train.json", ("fork", "cup", "plate"))
    cfg.test_dataloader = copy.deepcopy(cfg.train_dataloader)
    cfg.test_evaluator, cfg.test_cfg = dict(type="CocoMetric", ann_file=str(tmp_path / "train.json")), {}
    runner = build_runner(cfg)
    runner.test_loop  # noqa: B018 - builds it
    runner.call_hook("before_test")
    (log,) = Path(cfg.work_dir).glob("*/*.log")
    assert "train.json has the classes in the order fork, cup, plate, metainfo.classes is cup, plate, fork" in (
        log.read_text()
    )


@pytest.mark.parametrize("part", ["dataset", "metric"])
@pytest.mark.parametrize("key", ["images", "categories"])
def test_two_images_or_classes_of_one_id_are_refused(
    cfg: Config, key: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """pycocotools keeps the last of them, with the boxes of both."""
    file = tmp_path / "train.json"

    def build(argv: Any) -> None:
        with DefaultScope.overwrite_default_scope("mmdet"):
            if part == "dataset":
                assert len(DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset))) == 2
            else:
                METRICS.build(dict(type="CocoMetric", ann_file=str(file)))

    content = json.loads(file.read_text())
    content[key].append(copy.deepcopy(content[key][1]))
    file.write_text(json.dumps(content))
    build(None)  # the same entry twice
    content[key][1].update(file_name="2.png", name="spoon")
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="2"):
        command(build)([])
    names = "2.png and 1.png" if key == "images" else "spoon and plate"
    assert f"{file}: {key} has the id 1 twice, {names}: the " in capsys.readouterr().err


@pytest.mark.parametrize("change", ["crowd", "ids", "names"])
def test_a_metric_that_does_not_fit_the_data_is_refused_before_the_first_step(
    cfg: Config, change: str, tmp_path: Path
) -> None:
    content = json.loads((tmp_path / "train.json").read_text())
    if change == "crowd":
        _without(content, "annotations", "iscrowd")
        says = r"train\.json: annotations\[0\] has no 'iscrowd'"
    elif change == "ids":
        for image in content["images"]:
            image["id"] += 10
        says = r"image 0 of .*train\.json is .*0\.png, and no such image there"
    else:
        for image in content["images"]:
            image["file_name"] = f"b{image['id']}.png"
        says = r"the evaluator's ann_file is not of the images that are tested: .* and b0\.png there"
    (tmp_path / "other.json").write_text(json.dumps(content))
    cfg.val_dataloader = copy.deepcopy(cfg.train_dataloader)
    cfg.val_dataloader.dataset.test_mode = True
    cfg.val_evaluator = dict(type="CocoMetric", ann_file=str(tmp_path / "other.json"), metric="bbox")
    cfg.val_cfg = dict(type="ValLoop")
    if change == "crowd":
        (tmp_path / "train.json").write_text(json.dumps(content))
    runner = build_runner(cfg)
    with pytest.raises(ValueError, match=says):
        runner.train()
    assert runner.iter == 0


def test_results_that_cannot_be_written_are_found_before_the_first_step(cfg: Config, tmp_path: Path) -> None:
    cfg.val_dataloader = copy.deepcopy(cfg.train_dataloader)
    cfg.val_dataloader.dataset.test_mode = True
    prefix = f"{tmp_path}/train.json/results"  # a file is no folder
    cfg.val_evaluator = dict(type="CocoMetric", ann_file=f"{tmp_path}/train.json", outfile_prefix=prefix)
    cfg.val_cfg = dict(type="ValLoop")
    runner = build_runner(cfg)
    with pytest.raises(ValueError, match=f"{tmp_path}/train.json"):
        runner.train()
    assert runner.iter == 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"<html>", None])
def test_an_image_that_cannot_be_read_is_named(
    cfg: Config, workers: int, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "1.png"
    image.unlink() if content is None else image.write_bytes(content)
    cfg.train_dataloader.num_workers = workers
    with pytest.raises(SystemExit, match="2"):
        command(lambda argv: build_runner(cfg).train() and None)([])
    lines = capsys.readouterr().err.splitlines()
    assert str(image) in lines[-1]
    assert ("No such file" if content is None else "cannot be read as an image") in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_an_image_that_lies_on_its_side_is_refused_and_a_scaled_one_told_of(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "_scaled", [])
    picture = Image.new("RGB", (64, 48))
    exif = picture.getexif()
    exif[0x0112] = 6  # it was taken with the camera on its side
    path = str(tmp_path / "photo.jpg")
    picture.save(path, exif=exif)
    with DefaultScope.overwrite_default_scope("mmdet"):
        load = TRANSFORMS.build(dict(type="LoadImageFromFile"))
        stored = TRANSFORMS.build(dict(type="LoadImageFromFile", color_type="color_ignore_orientation"))
    upright, lying = dict(height=64, width=48), dict(height=48, width=64)
    for transform, right, wrong in ((load, upright, lying), (stored, lying, upright)):
        assert transform(dict(img_path=path, **right))["img_shape"] == (right["height"], right["width"])
        assert transform(dict(img_path=path))["img_shape"] == (right["height"], right["width"])
        with pytest.raises(ValueError, match=rf"{path} is {right['width']} pixels wide and .* have an EXIF note"):
            transform(dict(img_path=path, **wrong))
    assert caplog.text == ""
    for _ in range(2):
        load(dict(img_path=path, height=128, width=96))
    assert (
        caplog.text.count("photo.jpg is 48 pixels wide and 64 high as it is read, and its annotations are for 96") == 1
    )


def test_heads_of_two_stages_count_and_those_of_proposals_do_not() -> None:
    model = Config.fromfile(
        Path(mmitp.__file__).parents[1] / "configs/coco/faster-rcnn_r50_fpn_prune50_8xb2-1x_coco.py"
    ).model
    model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope("mmdet"):
        assert heads(MODELS.build(model)) == {"roi_head.bbox_head": 80}
