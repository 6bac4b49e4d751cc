"""Weights published for DLA-34 and CenterNet, renamed to the keys of our modules."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# CenterNet's module names and ours (mmdet's CenterNet detector with its CenterNetHead).
_CENTERNET_PREFIXES = {
    "base.": "backbone.",
    "dla_up.": "neck.dla_up.",
    "ida_up.": "neck.ida_up.",
    "hm.": "bbox_head.heatmap_head.",
    "wh.": "bbox_head.wh_head.",
    "reg.": "bbox_head.offset_head.",
}


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The flat state dict of a checkpoint, without the prefix that a data-parallel wrapper leaves."""
    state = checkpoint.get("state_dict", checkpoint)
    return {key.removeprefix("module."): value for key, value in state.items()}


def dla_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The backbone's part of a published checkpoint, with the key names of :class:`mmitp.models.dla.DLA`.

    Args:
        checkpoint: the ImageNet checkpoint of DLA-34 (a flat dict), a CenterNet checkpoint (``{'epoch',
            'state_dict'}``, backbone under ``base.``) or one of a detector built from our modules (backbone under
            ``backbone.``).

    Returns:
        A flat dict without the ImageNet classifier (``fc.weight``, ``fc.bias``).
    """
    state = _unwrap(checkpoint)
    for prefix in ("base.", "backbone."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def convert_centernet_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Renames a checkpoint of the CenterNet project (DLA-34, "Objects as Points") to our detector's keys.

    Ours is mmdet's ``CenterNet`` with the backbone ``mmitp.DLA``, the neck ``mmitp.DLAUp`` and mmdet's
    ``CenterNetHead`` or ``mmitp.KittiCenterNetHead``. The result loads strictly when the class counts agree, except
    that checkpoints written before torch 0.4.1 have no ``num_batches_tracked``. That project trained on images in
    blue-green-red order: to use such weights unchanged, set ``bgr_to_rgb=False`` in the data preprocessor.

    Args:
        checkpoint: ``{'epoch', 'state_dict'}`` or the flat state dict, with or without the prefix ``module.``.

    Returns:
        A flat state dict for the detector.

    Raises:
        ValueError: a key belongs to none of CenterNet's 2D-detection modules.
    """
    converted = {}
    for key, value in _unwrap(checkpoint).items():
        prefix = next((prefix for prefix in _CENTERNET_PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            known = ", ".join(_CENTERNET_PREFIXES)
            raise ValueError(
                f"'{key}' is not a key of CenterNet's 2D detector with DLA-34, whose keys start with {known}"
            )
        if key.startswith("base.fc."):
            continue
        renamed = _CENTERNET_PREFIXES[prefix] + key.removeprefix(prefix)
        converted[renamed.replace(".conv_offset_mask.", ".conv_offset.")] = value
    return converted
