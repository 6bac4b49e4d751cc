"""Which values of a network's state say that training has diverged."""

from __future__ import annotations

import torch
from torch import Tensor

# Last parts of the names of tensors that training moves; a buffer of another name may hold infinity as a constant.
_MOVED = {"weight", "bias", "running_mean", "running_var", "prune_mask"}


def diverged(name: str, value: Tensor) -> Tensor:
    """Whether an entry of a state dict holds NaN, or infinity where training put it: 0-dim bool, on its device.

    Attention masks, for one, are buffers that hold minus infinity in a network in good health.

    Args:
        name: the entry's name, as in ``state_dict()``.
        value: any shape and dtype.
    """
    is_parameter = value.requires_grad
    if value.is_floating_point() and value.element_size() == 1:
        value = value.detach().float()  # torch asks no 8-bit format for infinity
    trained = is_parameter or name.rpartition(".")[2] in _MOVED
    return ~torch.isfinite(value).all() if trained else torch.isnan(value).any()
