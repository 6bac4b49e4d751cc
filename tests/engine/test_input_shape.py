"""The size that a config trains at, from the config alone."""

from __future__ import annotations

from typing import Any

import pytest

from mmitp.engine.config import load_config
from mmitp.engine.input_shape import input_shape

DEFAULT = (224, 224)


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
        (dict(custom_hooks=[dict(type="mmitp.PruneHook")], **of(dict(type="CenterCrop", crop_size=48))), (48, 48)),
    ],
)  # fmt: skip
def test_the_last_fixed_size_of_the_pipeline_counts(config: dict[str, Any], shape: tuple[int, int]) -> None:
    assert input_shape(config, DEFAULT) == shape


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
