"""Re-parameterisation (RepVGG, MobileOne and their like) of networks that carry masks or have been slimmed.

Such networks merge the branches of a block into one convolution when they are deployed. Their code reads the weights
past the masks, and the channel numbers of the dense network.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .layers import masked_layers

#: What libraries call it (mmpretrain and mmyolo; RepLKNet; timm). Only methods without arguments are meant:
#: ``fuse(x)`` of a neck and ``reparameterize(mean, variance)`` are something else.
METHODS = ("switch_to_deploy", "merge_kernel", "reparameterize", "fuse")


def guard_reparameterization(model: nn.Module) -> None:
    """Makes the re-parameterisation methods of a model's classes heed masks and slimming.

    Under masks they first fold them into the weights (as :func:`~mmitp.pruning.fold_masks`, in the part of the network
    that is merged), so that the outcome computes what the masked network does. In a slimmed part they raise
    ``ValueError``. Networks with neither are merged as ever.
    """
    for cls in {type(module) for module in model.modules()}:
        for name in METHODS:
            owner = next((base for base in cls.__mro__ if name in vars(base)), None)
            method = vars(owner)[name] if owner is not None else None
            if inspect.isfunction(method) and not hasattr(method, "heeds_masks"):
                if len(inspect.signature(method).parameters) == 1:
                    setattr(owner, name, _heeding(method))


def _heeding(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def merge(self: nn.Module) -> Any:
        for name, layer in self.named_modules():
            if getattr(layer, "slimmed", False):
                raise ValueError(
                    f"{type(self).__name__}.{method.__name__}() merges branches of the dense network's sizes, but "
                    f"{name!r} has been slimmed. Either merge the masked network instead of slimming it (the masks are "
                    "folded into the weights, see fold_masks), or deploy the slimmed one as it is, with its BatchNorms "
                    "folded by fold_norms"
                )
        for layer in masked_layers(self).values():
            layer.fold()
        return method(self)

    merge.heeds_masks = True  # type: ignore[attr-defined]
    return merge
