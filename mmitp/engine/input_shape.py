"""The size of the images that a config trains on: as far as the config alone tells it, else as its data do."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import nn

from mmitp.engine.config import enter_scope
from mmitp.engine.data_paths import check_data, fetches
from mmitp.engine.example import example_inputs
from mmitp.models.config_text import type_name
from mmitp.models.slim_config import prune_hook_of
from mmitp.pruning.rng import kept_rng

#: transforms that give every image one size, and the argument that says which
_FIXED = {
    "CenterCrop": "crop_size",
    "EfficientNetRandomCrop": "scale",
    "Pad": "size",
    "RandomCenterCropPad": "crop_size",
    "RandomCrop": "crop_size",
    "RandomResizedCrop": "scale",
    "Resize": "scale",
    "ScaleShiftCrop": "size",
}
#: where these are; no scope at all is the default one
_LIBRARIES = {"", "mmcv", "mmdet", "mmitp", "mmpretrain"}
#: those that take width and height in this order in either library; of the others a square alone is clear
_WIDTH_FIRST = {"Pad", "Resize", "ScaleShiftCrop"}
#: CIFAR's images, which many configs train on as they are
_CIFAR = (32, 32)


def input_shape(cfg: Mapping[str, Any], default: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Height and width that a config's operations are to be stated for, in pixels.

    That of its ``PruneHook``, else what the last transform of the training pipeline that gives every image one size
    says, else CIFAR's for its data sets, else ``default`` (images of many sizes, or no data).

    Args:
        cfg: a config, complete or of a model alone.
        default: for configs that say nothing.

    Example:
        >>> pipeline = [dict(type="RandomCrop", crop_size=64, padding=4), dict(type="PackInputs")]
        >>> input_shape(dict(train_dataloader=dict(dataset=dict(pipeline=pipeline))), (224, 224))
        (64, 64)
    """
    hook = prune_hook_of(cfg)
    if hook is not None and hook.get("input_shape"):
        height, width = hook["input_shape"]
        return height, width
    loader = cfg.get("train_dataloader")
    for dataset in _datasets(loader.get("dataset") if isinstance(loader, Mapping) else None):
        for transform in reversed(dataset.get("pipeline") or []):
            if found := _fixed(transform):
                return found
        if "CIFAR" in type_name(dataset.get("type")):
            return _CIFAR
    return default


@kept_rng(seed=0)
def first_image_shape(cfg: Config, model: nn.Module) -> tuple[int, int] | None:
    """Height and width of a config's first training image as the model gets it, in a batch of one.

    ``PruneHook`` takes the size of the first batch, too, where nothing states one. Nothing is downloaded for it.

    Args:
        cfg: a config.
        model: the config's model, whose data preprocessor may pad.

    Returns:
        The size in pixels, or None where no training data are there, or they cannot be read.
    """
    loader = copy.deepcopy(cfg.get("train_dataloader") or {})
    for node in _datasets(loader.get("dataset")):
        if fetches(node):
            node["download"] = False
    try:
        check_data(Config(dict(train_dataloader=loader)), ("train_dataloader",))
        enter_scope(cfg)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            batch = pseudo_collate([DATASETS.build(loader["dataset"])[0]])
        height, width = example_inputs(model, batch)["inputs"].shape[-2:]
    except Exception:  # any kind: data sets and transforms are anybody's code
        return None
    return height, width


def _datasets(node: Any) -> Iterator[dict[str, Any]]:
    """A data set and those that it wraps, the outermost first: its transforms come last."""
    if isinstance(node, dict):
        yield node
        for inner in (node.get("dataset"), *(node.get("datasets") or [])):
            yield from _datasets(inner)


def _fixed(transform: Any) -> tuple[int, int] | None:
    if not isinstance(transform, Mapping):
        return None
    scope, _, kind = type_name(transform.get("type")).rpartition(".")
    if scope.partition(".")[0] not in _LIBRARIES:
        return None
    size = transform.get(_FIXED.get(kind, ""))
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        return None  # parts of the image
    if transform.get("keep_ratio") or size[0] != size[1] and kind not in _WIDTH_FIRST:
        return None
    return size[1], size[0]
