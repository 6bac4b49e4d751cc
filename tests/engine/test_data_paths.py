"""Missing data is named before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine import Config

from mmitp.engine.config import load_config
from mmitp.engine.data_paths import check_data

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kitti(tmp_path: Path) -> Config:
    """The project's KITTI config, its data in place."""
    cfg = load_config(str(ROOT / "configs" / "centernet_kitti_prune50.py"))
    for folder in ("training/image_2", "training/label_2", "ImageSets"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("train", "val"):
        (tmp_path / f"ImageSets/{name}.txt").write_text("000000\n")
    for part in ("train_dataloader", "val_dataloader"):
        cfg[part].dataset.data_root = f"{tmp_path}/"
    cfg.val_evaluator.data_root = f"{tmp_path}/"
    return cfg


PARTS = ("train_dataloader", "val_dataloader", "val_evaluator")


def test_complete_data_passes_and_each_missing_piece_is_named(kitti: Config, tmp_path: Path) -> None:
    check_data(kitti, PARTS)
    for piece, says in (
        ("ImageSets/val.txt", r"val_dataloader: no annotation file .*ImageSets/val\.txt \(mmitp.KittiDataset\)"),
        ("training/label_2", r"val_evaluator: no folder .*label_2 \(mmitp.KittiMetric\); data/README\.md"),
    ):
        (tmp_path / piece).rename(tmp_path / "away")
        with pytest.raises(ValueError, match=says):
            check_data(kitti, PARTS)
        (tmp_path / "away").rename(tmp_path / piece)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: dict(type="RepeatDataset", times=2, dataset=inner),
        lambda inner: dict(type="ConcatDataset", datasets=[inner]),
    ],
)
def test_data_sets_in_wrappers_are_looked_for(wrap, tmp_path: Path) -> None:
    inner = dict(type="CocoDataset", data_root=str(tmp_path), ann_file="a.json", data_prefix=dict(img="images/"))
    cfg = Config(dict(train_dataloader=dict(dataset=wrap(inner))))
    with pytest.raises(ValueError, match=r"annotation file .*a\.json"):
        check_data(cfg, ("train_dataloader",))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"folder .*images"):
        check_data(cfg, ("train_dataloader",))
    (tmp_path / "images").mkdir()
    check_data(cfg, ("train_dataloader", "absent_dataloader"))


@pytest.mark.parametrize(
    "dataset",
    [
        dict(type="CIFAR10", data_root="nowhere"),  # fetches it
        dict(type="CocoDataset", data_root="s3://bucket/coco/", ann_file="a.json"),
        dict(type="CocoDataset", data_root="coco/", ann_file="a.json", backend_args=dict(backend="petrel")),
    ],
)
def test_what_does_not_lie_in_the_file_system_is_passed_over(dataset: dict) -> None:
    check_data(Config(dict(test_dataloader=dict(dataset=dataset))), ("test_dataloader",))


def test_cifar_that_must_not_be_fetched_is_looked_for() -> None:
    dataset = dict(type="CIFAR10", data_root="nowhere", download=False)
    with pytest.raises(ValueError, match=r"no folder .*nowhere \(CIFAR10\)"):
        check_data(Config(dict(test_dataloader=dict(dataset=dataset))), ("test_dataloader",))
