"""The size that a config trains at, from the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine import Config
from mmengine.model import PretrainedInit

from mmitp.datasets.transforms import ScaleShiftCrop
from mmitp.engine.config import load_config
from mmitp.engine.hooks import PruneHook
from mmitp.engine.input_shape import input_shape
from mmitp.models.masked import MaskedModel
from mmitp.models.report import build_masked, stated_shape
from mmitp.models.slim_config import drop_pretrained, is_masked, prune_hook_of

DEFAULT = (224, 224)


class CenterCrop:
    """As a config of mmengine's newer style names one."""

    __module__ = "mmpretrain.datasets.transforms.processing"


def of(*pipeline: dict[str, Any], kind: str = "CustomDataset") -> dict[str, Any]:
    return dict(train_dataloader=dict(dataset=dict(type=kind, pipeline=list(pipeline))))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (of(dict(type="RandomCrop", crop_size=32, padding=4)), (32, 32)),
        (of(dict(type="RandomResizedCrop", scale=64), dict(type="CenterCrop", crop_size=48)), (48, 48)),
        (of(dict(type="mmpretrain.CenterCrop", crop_size=48)), (48, 48)),
        (of(dict(type="Pad", size=(256, 192))), (192, 256)),  # width first
        (of(dict(type="mmitp.ScaleShiftCrop", size=(512, 160))), (160, 512)),
        (of(dict(type="Resize", scale=(300, 200), keep_ratio=False)), (200, 300)),
        (of(dict(type="Resize", scale=(1333, 800), keep_ratio=True)), DEFAULT),
        (of(dict(type="RandomCrop", crop_size=(512, 384))), DEFAULT),  # the libraries' orders differ
        (of(dict(type="RandomCrop", crop_size=(0.5, 0.5))), DEFAULT),  # parts of the image
        (of(dict(type="PackInputs"), kind="CIFAR100"), (32, 32)),
        (of(dict(type="RandomCrop", crop_size=28), kind="CIFAR10"), (28, 28)),
        (of(), DEFAULT),
        (dict(), DEFAULT),
        (dict(train_dataloader=None, custom_hooks=None), DEFAULT),
        (dict(custom_hooks=[dict(type="mmitp.PruneHook", input_shape=(96, 128))], **of()), (96, 128)),
        (dict(custom_hooks=[dict(type=PruneHook, input_shape=(96, 128))], **of()), (96, 128)),
        (dict(custom_hooks=[dict(type="mmitp.engine.hooks.PruneHook", input_shape=(96, 128))], **of()), (96, 128)),
        (of(dict(type=CenterCrop, crop_size=48)), (48, 48)),
        (of(dict(type=ScaleShiftCrop, size=(512, 160))), (160, 512)),
        (of(dict(type="mmseg.Resize", scale=(300, 200))), DEFAULT),  # of a library that is not known here
        (dict(custom_hooks=[dict(type="mmitp.PruneHook")], **of(dict(type="CenterCrop", crop_size=48))), (48, 48)),
    ],
)  # fmt: skip
def test_the_last_fixed_size_of_the_pipeline_counts(config: dict[str, Any], shape: tuple[int, int]) -> None:
    assert input_shape(config, DEFAULT) == shape


@pytest.mark.parametrize("kind", ["mmitp.{}", "mmitp.engine.hooks.{}", "class"])
def test_parts_are_known_by_class_path_and_name(kind: str) -> None:
    named = {"PruneHook": PruneHook, "MaskedModel": MaskedModel}
    hook, model = (dict(type=cls if kind == "class" else kind.format(name)) for name, cls in named.items())
    assert prune_hook_of(dict(custom_hooks=[dict(type="EMAHook"), hook])) is hook
    assert prune_hook_of(dict(custom_hooks=[dict(type="EMAHook"), object(), dict()])) is None
    assert is_masked(model)
    for other in ("mmitp.SlimModel", "mmitp.models.UnmaskedModel", "mmfoo.MaskedModel", None):
        assert not is_masked(dict(model, type=other))


@pytest.mark.parametrize("kind", ["Pretrained", PretrainedInit])
def test_pretrained_weights_are_dropped_however_they_are_named(kind: Any) -> None:
    model = dict(backbone=dict(init_cfg=dict(type=kind, checkpoint="x.pth")), init_cfg=dict(type="Normal"))
    drop_pretrained(model)
    assert model == dict(backbone=dict(init_cfg=None), init_cfg=dict(type="Normal"))


def test_a_wrappers_transforms_come_after_those_of_the_data_set_inside() -> None:
    inner = dict(type="CocoDataset", pipeline=[dict(type="CenterCrop", crop_size=48)])
    wrapped = dict(type="MultiImageMixDataset", dataset=inner, pipeline=[dict(type="Pad", size=(64, 64))])
    assert input_shape(dict(train_dataloader=dict(dataset=wrapped)), DEFAULT) == (64, 64)
    del wrapped["pipeline"]
    assert input_shape(dict(train_dataloader=dict(dataset=wrapped)), DEFAULT) == (48, 48)
    several = dict(type="ConcatDataset", datasets=[dict(type="CocoDataset"), inner])
    assert input_shape(dict(train_dataloader=dict(dataset=several)), DEFAULT) == (48, 48)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mmpretrain::resnet/resnet18_8xb16_cifar10", (32, 32)),
        ("mmpretrain::efficientnet/efficientnet-b1_8xb32_in1k", (240, 240)),
        ("mmdet::ssd/ssd300_coco", (300, 300)),
        ("mmdet::centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco", (512, 512)),
        ("mmdet::retinanet/retinanet_r50_fpn_1x_coco", DEFAULT),
    ],
)
def test_packaged_configs(name: str, shape: tuple[int, int]) -> None:
    assert input_shape(load_config(name), DEFAULT) == shape


def test_the_size_comes_from_the_data_else_it_is_said_that_it_is_assumed(tmp_path: Path) -> None:
    name = "mmpretrain::resnet/resnet18_8xb16_cifar10"
    pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
    data = dict(type="CustomDataset", data_root=str(tmp_path), pipeline=pipeline)
    cfg = load_config(name)
    cfg.train_dataloader = Config(dict(dataset=data))
    model = build_masked(cfg)
    shape, source = stated_shape(cfg, model)
    assert (shape, source.partition(":")[0]) == ((224, 224), "assumed")  # no images are there
    (tmp_path / "a").mkdir()
    cv2.imwrite(str(tmp_path / "a/0.png"), np.zeros((20, 28, 3), np.uint8))
    shape, source = stated_shape(cfg, model)
    assert (shape, source.partition(",")[0]) == ((20, 28), "the size of the first training image")
    assert stated_shape(cfg, model, [16, 24]) == ((16, 24), "")
    assert stated_shape(load_config(name), model) == ((32, 32), "")
    cfg.train_dataloader.dataset = dict(type="MNIST", data_root=str(tmp_path / "none"), pipeline=pipeline[1:])
    assert stated_shape(cfg, model)[0] == (224, 224)
    assert not (tmp_path / "none").exists()  # nothing was fetched
