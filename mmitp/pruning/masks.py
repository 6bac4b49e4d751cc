"""Trainable prune masks: binarisation, straight-through gradient, freezing.

One mask value an input channel (``channel``) or a weight (``weight``). With the real-valued mask ``M`` (S2):

    M_norm = 0.5 * tanh(M) + 0.5,   M_b = round(M_norm) = [M > 0],   W~ = W * M_b,   dM_b/dM_norm := 1

so that ``dL/dM = dL/dM_b * 0.5 * (1 - tanh(M)^2)``. The largest entry of a mask is always on: a layer never loses
its last channel (our guard; the paper does not say).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GRANULARITIES = ("channel", "weight")

#: Value of ``prune_pattern`` while the mask still trains.
TRAINABLE = -1.0


def binarize(mask: Tensor) -> Tensor:
    """Binary mask ``M_b`` of any shape as float {0, 1}: ``M > 0``, and the (first) largest entry in any case.

    ``M > 0`` and not ``round(0.5 * tanh(M) + 0.5)``: the two differ in float32 next to zero.
    """
    flat = mask.reshape(-1)
    on = (flat > 0).to(mask.dtype)
    on[flat.argmax()] = 1.0
    return on.view(mask.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return binarize(mask)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grads[0] * ste_derivative(mask)


def ste_derivative(mask: Tensor) -> Tensor:
    """``dM_b/dM`` under the straight-through estimator of S2: ``0.5 * (1 - tanh(M)^2)``."""
    return 0.5 * (1 - torch.tanh(mask).square())


class MaskedLayer(nn.Module):
    """What every masked layer adds to its dense type: the mask, its frozen pattern and how both are loaded.

    Attributes:
        prune_mask: trainable ``M``, shape ``(in_channels,)`` or the weight's. An ordinary parameter of the optimizer.
        prune_pattern: persistent float buffer of the same shape; ``-1`` while the mask trains, ``{0, 1}`` once frozen.
        mask_granularity: ``'channel'`` or ``'weight'``.
    """

    prune_mask: nn.Parameter
    prune_pattern: Tensor
    weight: Any  # the dense type's parameter
    mask_granularity: str
    mask_init: float
    mask_frozen: bool
    dense_type: type[nn.Module]
    #: dimension of ``weight`` that counts the input channels (0 in a transposed convolution)
    weight_in_dim: int = 1

    def attach_mask(self, granularity: str, init: float) -> None:
        """Adds mask and pattern to a layer of the dense type (called once, by the conversion)."""
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}")
        weight = self.weight
        shape = weight.shape if granularity == "weight" else weight.shape[self.weight_in_dim : self.weight_in_dim + 1]
        self.mask_granularity = granularity
        self.mask_init = float(init)
        self.mask_frozen = False
        self.prune_mask = nn.Parameter(torch.full(shape, float(init), device=weight.device, dtype=torch.float32))
        self.register_buffer("prune_pattern", torch.full_like(self.prune_mask, TRAINABLE, requires_grad=False))

    def binary_mask(self) -> Tensor:
        """The pattern in force, float {0, 1}, without gradient: the frozen one, else that of the present ``M``."""
        if self.mask_frozen:
            return self.prune_pattern
        return binarize(self.prune_mask.detach())

    def effective_mask(self) -> Tensor:
        """The binary mask as the forward pass uses it, with the straight-through gradient to ``prune_mask``.

        Once frozen, the parameter stays in the graph with a zero gradient: taking it out would break the gradient
        reducer of DistributedDataParallel.
        """
        if self.mask_frozen:
            return self.prune_pattern + 0.0 * self.prune_mask
        return _StraightThrough.apply(self.prune_mask)

    def masked_weight(self) -> Tensor:
        """``W~ = W * M_b`` (S2), in the weight's shape."""
        return self.weight * self._expand(self.effective_mask()).to(self.weight.dtype)

    def _expand(self, mask: Tensor) -> Tensor:
        if self.mask_granularity == "weight":
            return mask
        shape = [1] * self.weight.dim()
        shape[self.weight_in_dim] = -1
        return mask.view(shape)

    def freeze_mask(self, pattern: Tensor | None = None) -> None:
        """Fixes the pattern (the present one by default); from now on the mask does not train."""
        if pattern is None:
            pattern = self.binary_mask()
        if pattern.shape != self.prune_mask.shape:
            raise ValueError(f"pattern of shape {tuple(pattern.shape)} for a mask of {tuple(self.prune_mask.shape)}")
        self.prune_pattern.copy_(pattern)
        self.mask_frozen = True

    def unfreeze_mask(self) -> None:
        """Lets the mask train again (its real values are kept)."""
        self.prune_pattern.fill_(TRAINABLE)
        self.mask_frozen = False

    def fold(self) -> None:
        """Writes the mask into the weight and turns the layer into its dense type again, in place."""
        with torch.no_grad():
            self.weight.mul_(self._expand(self.binary_mask()).to(self.weight.dtype))
        self.detach_mask()

    def detach_mask(self) -> None:
        """Turns the layer into its dense type again, its weight as it is."""
        del self.prune_mask
        del self.prune_pattern
        for name in ("mask_granularity", "mask_init", "mask_frozen"):
            delattr(self, name)
        dense = self.dense_type
        del self.dense_type
        self.__class__ = dense  # type: ignore[assignment]  # the inverse of the conversion's class swap

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A dense checkpoint loads: an absent mask means the initial value, an absent pattern a trainable mask."""
        for name, value in (("prune_mask", self.mask_init), ("prune_pattern", TRAINABLE)):
            state_dict.setdefault(prefix + name, torch.full_like(getattr(self, name), value, requires_grad=False))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.mask_frozen = bool((self.prune_pattern >= 0).all())

    def extra_repr(self) -> str:
        state = "frozen" if self.mask_frozen else "trainable"
        return f"{super().extra_repr()}, mask={self.mask_granularity} ({state})"
