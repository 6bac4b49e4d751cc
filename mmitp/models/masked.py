"""Builds any registered model with masks in place: one line composes pruning with an existing config."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from mmitp.engine.example import blank_example
from mmitp.pruning import MaskedConv2d, mask_model, share_masks
from mmitp.pruning.graph import record_graph
from mmitp.registry import MODELS

from . import dcn, mmcv_layers  # noqa: F401  make their layers known to the core
from .slim_config import FURTHER, is_type


@MODELS.register_module(name="MaskedConv2d")
def build_masked_conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    """What ``conv_cfg=dict(type='mmitp.MaskedConv2d')`` builds.

    Grouped and depthwise convolutions, and those of up to three channels (an image), stay without a mask. What else
    should have none shows only in a forward pass: the budget holds such masks open. ``mmitp.MaskedModel`` does not make
    them in the first place, as distributed training wants it.
    """
    in_channels = args[0] if args else kwargs["in_channels"]
    if kwargs.get("groups", 1) == 1 and in_channels > 3:
        return MaskedConv2d(*args, **kwargs)
    for name in ("mask_granularity", "mask_init"):
        kwargs.pop(name, None)
    return nn.Conv2d(*args, **kwargs)


@MODELS.register_module()
def MaskedModel(of: str, prune: dict[str, Any] | None = None, **model: Any) -> nn.Module:  # noqa: N802  a registry type
    """Builds the model of type ``of`` from the remaining keys and gives its convolutions trainable masks.

    The model itself is returned, not a wrapper: names and checkpoints stay those of the original. Masks exist before
    the Runner wraps the model for distributed training and builds the optimizer, as both need.

    Args:
        of: the original ``type``, with its scope (``'mmdet.CenterNet'``).
        prune: keyword arguments of :func:`mmitp.pruning.mask_model` (``granularity``, ``init``, ``include``, ...), and
            ``share='stream'`` for one mask for all readers of a residual stream
            (:func:`mmitp.pruning.share_masks`); ``shape=(H, W)``, the image size of the forward pass
            that tells which layers can carry one (default (64, 64)).
        **model: the original model config.

    Raises:
        ValueError: ``mask_model`` finds nothing to mask, ``prune`` has an unknown key or ``share``, masks are to be
            shared and the model does not run on an image of the shape, or ``of`` is a slimmed network.
    """
    if is_type(dict(type=of), "SlimModel"):
        raise ValueError(f"model.of is a slimmed network's, which gets no masks; {FURTHER}")
    built = ROOT_MODELS.build(dict(type=of, **model))
    options = dict(prune or {})
    share, shape = options.pop("share", None), options.pop("shape", (64, 64))
    if share not in (None, "stream"):
        raise ValueError(f"model.prune.share must be 'stream' or absent, got {share!r}")
    unknown = set(options) - {"granularity", "init", "include", "exclude", "linear"}
    if unknown:
        raise ValueError(f"unknown key(s) {sorted(unknown)} in model.prune; see mmitp.pruning.mask_model")
    # Many backbones freeze their stages here, and frozen layers stay dense.
    built.train()
    example = _example(built, tuple(shape), required=share is not None)
    mask_model(built, **options, example_inputs=example)
    if share is not None:
        share_masks(built, example)
    return built


def _example(model: nn.Module, shape: tuple[int, int], required: bool) -> Any:
    """An input that the model runs on, of the given size or else of the usual fixed one; None if there is none.

    Raises:
        ValueError: there is none and it is required.
    """
    reason = ""
    for size in dict.fromkeys((shape, (224, 224))):
        for example in (blank := blank_example(model, size), blank["inputs"]):  # a whole model, or a bare backbone
            try:
                with torch.random.fork_rng(devices=[]):  # the weights are to be drawn yet
                    record_graph(model, example)
                return example
            except Exception as error:  # whatever a foreign model raises on an input that it is not made for
                reason = reason or f"{type(error).__name__}: {error}"
    failed = f"MaskedModel: {type(model).__name__} does not run on a blank image of {shape[0]}x{shape[1]} ({reason}). "
    if required:
        raise ValueError(
            f"{failed}Who reads a stream shows in a forward pass alone: give a size that the model takes, "
            "model.prune = dict(share='stream', shape=(H, W))"
        )
    MMLogger.get_current_instance().warning(
        f"{failed}Which layers get masks goes by registration order then, and a mask that turns out useless is held "
        "open; give a size that the model takes, model.prune = dict(shape=(H, W))"
    )
    return None
