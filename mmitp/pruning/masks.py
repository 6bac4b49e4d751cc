"""Trainable prune masks: binarisation, straight-through gradient, freezing.

One mask value an input channel (``channel``) or a weight (``weight``). With the real-valued mask ``M`` (S2):

    M_norm = 0.5 * tanh(M) + 0.5,   M_b = round(M_norm) = [M > 0],   W~ = W * M_b,   dM_b/dM_norm := 1

so that ``dL/dM = dL/dM_b * 0.5 * (1 - tanh(M)^2)``. The largest entry of a mask is always on: a layer never loses
its last channel (our guard; the paper does not say).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

GRANULARITIES = ("channel", "weight")

#: Value of ``prune_pattern`` while the mask still trains.
TRAINABLE = -1.0

#: What is wrong with a mask that holds NaN or infinity, and what to do.
NOT_FINITE = (
    "its mask holds values that are not finite: the loss or its gradient was NaN or infinite. Go back to a checkpoint "
    "from before, and lower the learning rate or clip the gradients"
)

#: How far from zero a mask is put at most where its real value has to agree with a pattern again.
SIDE = 1e-3


def binarize(mask: Tensor) -> Tensor:
    """Binary mask ``M_b`` of any shape as float {0, 1}: ``M > 0``, and the (first) largest entry in any case.

    ``M > 0`` and not ``round(0.5 * tanh(M) + 0.5)``: the two differ in float32 next to zero.
    """
    flat = mask.reshape(-1)
    on = (flat > 0).to(mask.dtype)
    return on.scatter_(0, flat.argmax(0, keepdim=True), 1.0).view(mask.shape)


def first_maxima(masks: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """The first largest entry of each of many masks in one flat vector, as bool: what no layer may lose.

    Entries are compared as they are: a difference in the last place counts.

    Args:
        masks: ``(N,)`` float, one mask after the other, finite.
        row: ``(N,)`` int64, of every entry the number of its mask, below ``n_rows``.
        n_rows: how many numbers there are.
    """
    top = masks.new_full((n_rows,), -torch.inf).scatter_reduce(0, row, masks, "amax")
    index = torch.arange(len(masks), device=masks.device)
    at_top = torch.where(masks == top.index_select(0, row), index, len(masks))
    first = torch.full((n_rows,), len(masks), device=masks.device).scatter_reduce(0, row, at_top, "amin")
    return index == first.index_select(0, row)


def binarize_rows(masks: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """:func:`binarize` of many masks in one flat vector, as bool (arguments of :func:`first_maxima`)."""
    return (masks > 0) | first_maxima(masks, row, n_rows)


def ranks(masks: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """Every entry's place in its mask by falling value, from 0, ties in order (arguments of :func:`first_maxima`)."""
    order = masks.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    first = torch.zeros(n_rows + 1, dtype=torch.long, device=masks.device)
    first = first.index_add_(0, row + 1, torch.ones_like(row)).cumsum(0)  # bincount would wait for the device
    place = torch.empty_like(row)
    place[order] = torch.arange(len(row), device=masks.device) - first[row[order]]
    return place


def ste_derivative(mask: Tensor) -> Tensor:
    """``dM_b/dM`` under the straight-through estimator of S2: ``0.5 * (1 - tanh(M)^2)``."""
    return 0.5 * (1 - torch.tanh(mask).square())


class _Masked(torch.autograd.Function):
    """:func:`masked_values` in as few and as small operations as it takes: what training runs.

    ``on`` and ``slope`` are ``M_b`` and ``dM_b/dM``; without a slope the mask is frozen and its gradient zero. ``dim``
    is the dimension of ``values`` that the mask runs along, None for a mask of the same shape.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, on: Tensor, slope: Tensor | None, dim: int | None) -> Tensor:
        on = on.to(values.dtype)
        if dim is not None:
            on = on.view([-1 if d == dim else 1 for d in range(values.dim())])
            if dim == 1 and 1 < values.shape[2:].numel() < 64:
                # Written out for one row: the inner loop of the product would have a kernel's nine numbers.
                on = torch.empty_like(values[:1]).copy_(on)
        ctx.dim = dim
        ctx.save_for_backward(mask, on, *([] if slope is None else [slope, values]))
        return values * on

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        mask, on, *training = ctx.saved_tensors
        d_values = grads[0] * on if ctx.needs_input_grad[0] else None
        d_mask = None
        if ctx.needs_input_grad[1]:
            if training:
                slope, values = training
                d_on = grads[0] * values
                d_mask = (d_on if ctx.dim is None else _sum_to(d_on, ctx.dim)) * slope
            else:
                d_mask = torch.zeros_like(mask)
        return d_values, d_mask, None, None, None


def _sum_to(values: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but one. Rows first: a sum whose inner loop is a kernel's nine numbers is slow."""
    if dim == 1:
        values, dim = values.sum(0), 0
    others = [d for d in range(values.dim()) if d != dim]
    return values.sum(others) if others else values


def masked_values(values: Tensor, mask: Tensor, on: Tensor, slope: Tensor, dim: int | None) -> Tensor:
    """``values * M_b`` with the straight-through gradient to ``M``, as plain operations.

    :class:`_Masked` is several times as fast, but ``torch.func`` (``grad``, ``vmap``, ``jvp``) can only transform a
    custom function that costs more to call in every training step.
    """
    gate = on + slope * (mask - mask.detach())
    if dim is not None:
        gate = gate.view([-1 if d == dim else 1 for d in range(values.dim())])
    return values * gate.to(values.dtype)


class MaskedLayer(nn.Module):
    """What every masked layer adds to its dense type: the mask, its frozen pattern and how both are loaded.

    Attributes:
        prune_mask: trainable ``M``, shape ``(in_channels,)`` or the weight's. An ordinary parameter of the optimizer.
        prune_pattern: persistent float buffer of the same shape; ``-1`` while the mask trains, ``{0, 1}`` once frozen.
        mask_frozen: whether it is frozen: what the buffer says, known on the host, because asking the device at every
            pass would stop it. Write the buffer with :meth:`freeze_mask`, :meth:`unfreeze_mask` or
            :meth:`set_pattern`, which keep the two together.
        mask_granularity: ``'channel'`` or ``'weight'``.
    """

    prune_mask: nn.Parameter
    prune_pattern: Tensor
    weight: Any  # the dense type's parameter
    mask_granularity: str
    mask_init: float
    mask_frozen: bool
    dense_type: type[nn.Module]
    #: the layer was named for masking itself: channels of the model's input may go too
    asked_for: bool = False
    #: dimension of ``weight`` that counts the input channels (0 in a transposed convolution)
    weight_in_dim: int = 1
    #: dimension of the input that counts them, from behind (-1 in a linear layer)
    input_dim: int = -3
    #: ``(in_channels,)`` int64 where the mask is tied to those of other layers (:func:`mmitp.pruning.share_masks`):
    #: entries of one number are one entry, also within the mask
    mask_ties: Tensor | None = None
    #: and which part of the mask an entry belongs to, ``(in_channels,)`` int64: the channels that the same layers read.
    #: No part loses its last channel
    mask_parts: Tensor | None = None
    #: and which entry decides for an entry, ``(in_channels,)`` int64: the mask's first one of the same number. None
    #: where all have numbers of their own
    mask_firsts: Tensor | None = None
    #: ``M_b`` and ``dM_b/dM`` while a :class:`MaskBank` has them ready
    evaluated: tuple[Tensor, Tensor] | None = None

    def attach_mask(self, granularity: str, init: float) -> None:
        """Adds mask and pattern to a layer of the dense type (called once, by the conversion)."""
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}")
        if not 0 < init < math.inf:
            raise ValueError(
                f"masks must start at a positive number (S1: 1.0), or all are off at once; got init={init}"
            )
        weight = self.weight
        shape = weight.shape if granularity == "weight" else weight.shape[self.weight_in_dim : self.weight_in_dim + 1]
        self.mask_granularity = granularity
        self.mask_init = float(init)
        self.mask_frozen = False
        self.prune_mask = nn.Parameter(torch.full(shape, float(init), device=weight.device, dtype=torch.float32))
        self.register_buffer("prune_pattern", torch.full_like(self.prune_mask, TRAINABLE, requires_grad=False))

    def tie_mask(self, ties: Tensor, parts: Tensor) -> None:
        """Ties the mask's entries to others by their numbers (``mask_ties``, ``mask_parts``)."""
        _, number = ties.unique(return_inverse=True)
        places = torch.arange(len(ties))
        firsts = torch.full_like(places, len(ties)).scatter_reduce(0, number, places, "amin")[number]
        self.mask_ties, self.mask_parts = ties, parts
        self.mask_firsts = None if torch.equal(firsts, places) else firsts

    def binary_mask(self) -> Tensor:
        """The pattern in force, float {0, 1}, without gradient: the frozen one, else that of the present ``M``."""
        if self.mask_frozen:
            return self.prune_pattern
        return self._binarized(self.prune_mask.detach())

    def _binarized(self, mask: Tensor) -> Tensor:
        if self.mask_parts is None:
            return binarize(mask)
        rows = self.mask_parts.to(mask.device)
        on = binarize_rows(mask, rows, int(self.mask_parts.max()) + 1).to(mask.dtype)
        return on if self.mask_firsts is None else on[self.mask_firsts.to(mask.device)]

    def masked_weight(self) -> Tensor:
        """``W~ = W * M_b`` (S2), in the weight's shape."""
        return self._mask(self.weight, None if self.mask_granularity == "weight" else self.weight_in_dim)

    def masks_input(self, x: Tensor, n_weights: int) -> bool:
        """Whether to mask the layer's input ``x`` and not its ``n_weights`` weights: the product is the same.

        Where maps are small and channels many, at the deep end of a network, there is much less to multiply. In mixed
        precision the gradient of the masks stays with the weights, in single precision.
        """
        per_channel = self.mask_granularity == "channel"
        return per_channel and x.numel() < n_weights and x.dtype == self.weight.dtype == self.prune_mask.dtype

    def masked_input(self, x: Tensor) -> Tensor:
        """``x`` with its dropped channels at zero; the channels are dimension ``input_dim``."""
        return self._mask(x, x.dim() + self.input_dim)

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight for the layer's product, the smaller of them masked."""
        if self.masks_input(x, self.weight.numel()):
            return self.masked_input(x), self.weight
        return x, self.masked_weight()

    def _mask(self, values: Tensor, dim: int | None) -> Tensor:
        """Once frozen, the parameter stays in the graph with a zero gradient.

        Taking it out would break the gradient reducer of DistributedDataParallel.
        """
        mask = self.prune_mask.detach()
        if torch._C._are_functorch_transforms_active():
            # No branch on the state either: an ensemble under vmap holds many patterns in one buffer.
            frozen = self.prune_pattern >= 0
            now = torch.where(frozen, self.prune_pattern, self._binarized(mask))
            return masked_values(values, self.prune_mask, now, ste_derivative(mask).masked_fill(frozen, 0), dim)
        on: Tensor
        slope: Tensor | None
        if self.mask_frozen:
            on, slope = self.prune_pattern, None
        elif self.evaluated is not None:
            on, slope = self.evaluated
        else:
            on, slope = self._binarized(mask), ste_derivative(mask)
        return _Masked.apply(values, self.prune_mask, on, slope, dim)

    def _expand(self, mask: Tensor) -> Tensor:
        if self.mask_granularity == "weight":
            return mask
        shape = [1] * self.weight.dim()
        shape[self.weight_in_dim] = -1
        return mask.view(shape)

    def freeze_mask(self, pattern: Tensor | None = None) -> None:
        """Fixes the pattern (the present one by default); from now on the mask does not train.

        Raises:
            ValueError: a pattern of another shape, without any entry on, or with values other than 0 and 1.
        """
        if pattern is None:
            pattern = self.binary_mask()
            if not bool(torch.isfinite(self.prune_mask).all()):
                raise ValueError(f"{type(self).__name__} with weights of {tuple(self.weight.shape)}: {NOT_FINITE}")
        if problem := self.pattern_problem(pattern):
            raise ValueError(f"{type(self).__name__} with weights of {tuple(self.weight.shape)}: {problem}")
        self.prune_pattern.copy_(pattern)
        self.mask_frozen = True

    def pattern_problem(self, pattern: Tensor) -> str:
        """Why a pattern cannot be this layer's; empty if it can."""
        if pattern.shape != self.prune_mask.shape:
            return f"a pattern of shape {tuple(pattern.shape)} for a mask of {tuple(self.prune_mask.shape)}"
        if not bool(((pattern == 0) | (pattern == 1)).all()):
            return "a pattern with values other than 0 and 1 (it must be binary)"
        if not bool(pattern.any()):
            return "a pattern that leaves the layer without any input: at least one entry must be 1"
        return ""

    @torch.no_grad()
    def unfreeze_mask(self) -> None:
        """Lets the mask train again, from the pattern it was frozen at.

        Real values on the other side of zero than their pattern are put next to zero on its side, in their order.
        """
        if self.mask_frozen:
            mask, on = self.prune_mask, self.prune_pattern > 0
            mask.copy_(torch.where(on & (mask <= 0), SIDE / (1 - mask), mask))
            mask.copy_(torch.where(~on & (mask > 0), -SIDE / (1 + mask), mask))
        self.prune_pattern.fill_(TRAINABLE)
        self.mask_frozen = False

    @torch.no_grad()
    def set_pattern(self, pattern: Tensor) -> None:
        """Makes ``pattern`` the content of ``prune_pattern`` as it is: frozen, or ``-1`` for a mask that trains.

        To put back a saved buffer. It neither checks the pattern nor touches ``M``; :meth:`freeze_mask` does.
        """
        self.prune_pattern.copy_(pattern)
        self._note_pattern()

    def _note_pattern(self) -> None:
        self.mask_frozen = bool((self.prune_pattern >= 0).all())

    def fold(self) -> None:
        """Writes the mask into the weight and turns the layer into its dense type again, in place."""
        with torch.no_grad():
            self.weight.mul_(self._expand(self.binary_mask()).to(self.weight.dtype))
        self.detach_mask()

    def detach_mask(self) -> None:
        """Turns the layer into its dense type again, its weight as it is; one that was cut keeps gather and scatter."""
        del self.prune_mask
        del self.prune_pattern
        for name in ("mask_granularity", "mask_init", "mask_frozen"):
            delattr(self, name)
        for name in ("mask_ties", "mask_parts", "mask_firsts"):
            self.__dict__.pop(name, None)
        types = [t for t in type(self).__mro__ if issubclass(t, self.dense_type) and not issubclass(t, MaskedLayer)]
        del self.dense_type
        self.__class__ = types[0]  # type: ignore[assignment]  # the inverse of the conversion's class swap

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
        """What the state dict holds of this layer decides.

        - The mask or its pattern: they load like any parameter and buffer; one that is absent is a missing key.
        - The weight (in this layer's shape) and neither of the two: a dense checkpoint. The mask starts anew, at its
          initial value and trainable, and no key is missing, not even to ``strict=True``.
        - Neither: nothing changes, and every key of the layer is missing, as in any layer. So loading a head or a
          backbone with ``strict=False`` leaves the masks of the rest as they are.
        """
        weight = state_dict.get(prefix + "weight")
        masked = prefix + "prune_mask" in state_dict or prefix + "prune_pattern" in state_dict
        if not masked and isinstance(weight, Tensor) and weight.shape == self.weight.shape:
            for name, value in (("prune_mask", self.mask_init), ("prune_pattern", TRAINABLE)):
                like: Tensor = getattr(self, name)
                state_dict[prefix + name] = torch.full(like.shape, value, dtype=like.dtype, device=weight.device)
        mask = self.prune_mask
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.prune_mask is not mask:  # assign=True: layers that share a mask take the same new one
            self.prune_mask = mask.__dict__.setdefault("assigned", self.prune_mask)
        if prefix + "prune_pattern" in state_dict:
            self._note_pattern()

    def extra_repr(self) -> str:
        state = "frozen" if self.mask_frozen else "trainable"
        return f"{super().extra_repr()}, mask={self.mask_granularity} ({state})"


def weights_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module by name that are no masks."""
    return ((name, p) for name, p in module.named_parameters() if name.split(".")[-1] != "prune_mask")


class MaskBank:
    """Binarises the masks of many layers together, at the start of every forward pass of the model they belong to.

    A dozen operators instead of a dozen a layer: what counts where operators take longer to launch than to run. Layers
    work without it just as well.

    Args:
        model: the model; its forward hooks carry the bank until :meth:`remove`.
        layers: the masked layers in it.
    """

    def __init__(self, model: nn.Module, layers: Iterable[MaskedLayer]) -> None:
        self.layers = list(layers)
        # of the present masks (device and sizes): (N,) int64, the number of every entry's mask or part of one; how many
        # numbers; (N,) int64, the entry that decides for an entry, None where every one does for itself
        self._rows: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, int, Tensor | None]] = {}
        self._handles = [
            model.register_forward_pre_hook(self._fill),
            model.register_forward_hook(self._clear, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _fill(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # compiled layers fuse these operators themselves
        owners: dict[nn.Parameter, list[MaskedLayer]] = {}  # layers may share a mask
        for layer in self.layers:
            if isinstance(layer, MaskedLayer) and not layer.mask_frozen:  # it may have been folded or slimmed since
                owners.setdefault(layer.prune_mask, []).append(layer)
        masks = list(owners)
        if len({(m.device, m.dtype) for m in masks}) != 1:
            return
        sizes = [m.numel() for m in masks]
        flat = torch.cat([m.reshape(-1) for m in masks])
        key = flat.device, tuple(sizes)
        if key not in self._rows:
            rows, count, firsts = self._numbered([owners[m][0] for m in masks], sizes)
            self._rows = {key: (rows.to(flat.device), count, None if firsts is None else firsts.to(flat.device))}
        rows, count, firsts = self._rows[key]
        on = binarize_rows(flat, rows, count).to(flat.dtype)
        on = on if firsts is None else on[firsts]
        for mask, a, b in zip(masks, on.split(sizes), ste_derivative(flat).split(sizes), strict=True):
            for layer in owners[mask]:
                layer.evaluated = a.view(mask.shape), b.view(mask.shape)

    @staticmethod
    def _numbered(layers: list[MaskedLayer], sizes: list[int]) -> tuple[Tensor, int, Tensor | None]:
        """Of every entry the number of its mask, or of the part of it that keeps a channel of its own; how many; and of
        every entry the one that decides for it."""
        rows, count, start = [], 0, 0
        firsts = torch.arange(sum(sizes)) if any(layer.mask_firsts is not None for layer in layers) else None
        for layer, size in zip(layers, sizes, strict=True):
            parts = torch.zeros(size, dtype=torch.long) if layer.mask_parts is None else layer.mask_parts
            rows.append(parts + count)
            count += int(parts.max()) + 1
            if firsts is not None and layer.mask_firsts is not None:
                firsts[start : start + size] = layer.mask_firsts + start
            start += size
        return torch.cat(rows), count, firsts

    def _clear(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for layer in self.layers:
            layer.__dict__.pop("evaluated", None)


def remove_banks(model: nn.Module) -> None:
    """Takes the hooks of every :class:`MaskBank` off a model, also of one that a copy has inherited."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, call in hooks.items() if isinstance(getattr(call, "__self__", None), MaskBank)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
