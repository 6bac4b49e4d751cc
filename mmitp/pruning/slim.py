"""Physical removal of what the masks leave unread: a plain, smaller network that computes the same.

Two questions are kept apart. *Which channels are computed* follows the needs alone, so the MACs equal the budget's
as an integer. *Which channels a tensor carries* follows from the unchanged code of the model: channels that an
addition or a shared module ties together are carried while any of them is needed, and tensors whose code has channel
numbers in it keep their width. A layer that reads less than its input carries gathers; one that computes less than
its output carries scatters into zeros that nobody reads.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .budget import MacBudget
from .layers import _KINDS, ChannelPad, Conv2dKind, kind_of, masked_layers
from .masks import NOT_FINITE
from .needs import carried_channels, channel_masked
from .reparam import guard_reparameterization
from .verify import difference, difference_in_double

logger = logging.getLogger(__name__)


# The functions below are steps of a network to torch.fx (torch.fx.wrap), and TorchScript compiles them.


def _channels_last(x: Tensor) -> bool:
    """Whether the layout is ``channels_last``; never for ONNX, which knows one layout and would transpose."""
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            return False
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def zeros(x: Tensor, *shape: int) -> Tensor:
    """Zeros of a shape, in the type and layout of ``x``."""
    return _zeros(x, list(shape))


def _zeros(x: Tensor, shape: list[int]) -> Tensor:
    out = x.new_zeros(shape)
    return out.contiguous(memory_format=torch.channels_last) if _channels_last(x) else out


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """``x.index_select(dim, index)`` that keeps ``channels_last``.

    ``index_select`` returns the default layout, and everything up to the next addition would stay in it: three times
    slower on the CPU where channels are few (a 3x3 convolution of 16 channels at 32x32, forward and backward).
    """
    if _channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(-1, index).permute(0, 3, 1, 2)
    return x.index_select(dim, index)


def scatter(x: Tensor, dim: int, index: Tensor, width: int) -> Tensor:
    """``x`` at the positions ``index`` of a tensor of ``width`` channels, zeros elsewhere, in the layout of ``x``."""
    if _channels_last(x):
        n, _, h, w = x.shape
        return x.new_zeros([n, h, w, width]).index_copy_(-1, index, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    shape = list(x.shape)
    shape[dim] = width
    return x.new_zeros(shape).index_copy_(dim, index, x)


def conv_zeros(
    x: Tensor, width: int, pads: list[int], kernel: list[int], stride: list[int], dilation: list[int]
) -> Tensor:
    """Zeros of a 2d convolution's output shape and the input's layout, without the convolution.

    Args:
        x: the input, (N, C, H, W) or (C, H, W).
        width: output channels.
        pads: left, right, top and bottom, as ``F.pad`` takes them.
        kernel, stride, dilation: vertical and horizontal.
    """
    shape = list(x.shape)
    shape[-3] = width
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1) + 1
        shape[i - 2] = (x.shape[i - 2] + pads[2 - 2 * i] + pads[3 - 2 * i] - reach) // stride[i] + 1
    return _zeros(x, shape)


def conv_transpose_zeros(
    x: Tensor,
    width: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    extra: list[int],
    dilation: list[int],
) -> Tensor:
    """:func:`conv_zeros` of a transposed convolution; ``extra`` is its ``output_padding``."""
    shape = list(x.shape)
    shape[-3] = width
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1) + 1
        shape[i - 2] = (x.shape[i - 2] - 1) * stride[i] - 2 * padding[i] + reach + extra[i]
    return _zeros(x, shape)


def linear_zeros(x: Tensor, width: int) -> Tensor:
    """Zeros of a linear layer's output shape."""
    return x.new_zeros(list(x.shape[:-1]) + [width])


for _name in ("gather", "scatter", "conv_zeros", "conv_transpose_zeros", "linear_zeros"):
    torch.fx.wrap(_name)


class SlimLayer(nn.Module):
    """A layer behind a gather of its input channels and before a scatter of its output channels, where needed.

    A type of its own derives from it, the dense type and the dense type's bases (see :func:`register_slim`), and takes
    the dense type's arguments by the same names.

    Attributes:
        in_index: buffer of input positions to read, or None to read the whole input.
        out_index: buffer of positions of the computed channels in an output of ``out_width`` channels, or None.
        empty: no reader keeps a channel of this layer: it gives zeros and computes nothing.
    """

    if TYPE_CHECKING:  # TorchScript cannot read annotations that are strings
        in_index: Tensor | None
        out_index: Tensor | None
        out_width: int
        empty: bool
    channel_dim = -3

    def wire(self, in_index: Tensor | None, out_index: Tensor | None, out_width: int) -> None:
        self.register_buffer("in_index", in_index)
        self.register_buffer("out_index", out_index)
        self.out_width = out_width
        self.channel_dim = type(self).channel_dim  # TorchScript sees attributes of the instance only
        self.empty = out_index is not None and len(out_index) == 0

    def read(self, x: Tensor) -> Tensor:
        """The channels of the input that the layer reads."""
        index = self.in_index
        return x if index is None else gather(x, self.channel_dim, index)

    def write(self, out: Tensor) -> Tensor:
        """The computed channels in their places."""
        index = self.out_index
        return out if index is None else scatter(out, self.channel_dim, index, self.out_width)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # by the dense type's name for it
            args = (kwargs.pop(next(iter(inspect.signature(super().forward).parameters))),)
        x, *args = args  # type: ignore[assignment]
        x = self.read(x)
        return self._nothing(x) if self.empty else self.write(super().forward(x, *args, **kwargs))

    def _nothing(self, x: Tensor) -> Tensor:
        """Zeros in the output's shape and the input's layout, at no cost."""
        raise NotImplementedError


class SlimConv2d(SlimLayer, nn.Conv2d, _ConvNd):
    """``nn.Conv2d`` with gather and scatter."""

    if TYPE_CHECKING:  # tuples, which TorchScript turns into the lists that functions declare
        kernel_size: Any
        stride: Any
        dilation: Any

    def forward(self, input: Tensor) -> Tensor:
        x = self.read(input)
        return self._nothing(x) if self.empty else self.write(self._conv_forward(x, self.weight, self.bias))

    def _nothing(self, x: Tensor) -> Tensor:
        pads = self._reversed_padding_repeated_twice
        return conv_zeros(x, self.out_width, pads, self.kernel_size, self.stride, self.dilation)


class SlimConvTranspose2d(SlimLayer, nn.ConvTranspose2d, _ConvTransposeNd):
    """``nn.ConvTranspose2d`` with gather and scatter."""

    if TYPE_CHECKING:  # tuples, which TorchScript turns into the lists that functions declare
        kernel_size: Any
        stride: Any
        dilation: Any
        padding: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self.read(input)
        extra = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        if self.empty:
            geometry = (self.kernel_size, self.stride, self.padding, extra, self.dilation)
            return conv_transpose_zeros(x, self.out_width, *geometry)
        out = F.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )
        return self.write(out)


class SlimLinear(SlimLayer, nn.Linear):
    """``nn.Linear`` with gather and scatter of features."""

    channel_dim = -1

    def forward(self, input: Tensor) -> Tensor:
        x = self.read(input)
        return linear_zeros(x, self.out_width) if self.empty else self.write(F.linear(x, self.weight, self.bias))


_SLIM: dict[type[nn.Module], type[SlimLayer]] = {
    nn.Conv2d: SlimConv2d,
    nn.ConvTranspose2d: SlimConvTranspose2d,
    nn.Linear: SlimLinear,
}


def register_slim(dense: type[nn.Module], slim: type[SlimLayer]) -> None:
    """Names the gathering/scattering form of a layer type added with ``register_kind``.

    Derive it from :class:`SlimLayer`, the dense type and the dense type's own bases, as the masked type.
    """
    _SLIM[dense] = slim


def slim_kind(module: nn.Module) -> Conv2dKind | None:
    """:func:`~mmitp.pruning.layers.kind_of`, for layers with gather and scatter too."""
    dense = next((dense for dense, slim in _SLIM.items() if type(module) is slim), None)
    return kind_of(module) if dense is None else _KINDS[dense]


@dataclass
class LayerPlan:
    """What stays of one layer: kept channels (index tensors), and where they sit in the tensors beside it."""

    in_keep: Tensor
    out_keep: Tensor
    in_index: Tensor | None
    out_index: Tensor | None
    out_width: int


@dataclass
class SlimPlan:
    """What stays of every layer and per-channel module, by module name.

    Of a :class:`ChannelPad` that is a number of zero channels in front, of channels passed on, and of zeros after them.
    """

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    pads: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def spec(self) -> dict[str, Any]:
        """The structure alone as plain dicts of ints (JSON-able); the indices travel in the state dict."""
        layers = {}
        for name, p in self.layers.items():
            entry: dict[str, Any] = dict(inputs=len(p.in_keep), outputs=len(p.out_keep))
            if p.in_index is not None:
                entry["gather"] = True
            if p.out_index is not None:
                entry["scatter"] = p.out_width
            layers[name] = entry
        norms = {name: len(keep) for name, keep in self.norms.items()}
        return dict(layers=layers, norms=norms, pads={name: list(pad) for name, pad in self.pads.items()})

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> SlimPlan:
        """The plan that gives a dense model the structure of a spec; which channels is left to the state dict."""
        plan = SlimPlan()
        for name, entry in spec["layers"].items():
            n_in, n_out = int(entry["inputs"]), int(entry["outputs"])
            plan.layers[name] = LayerPlan(
                torch.arange(n_in),
                torch.arange(n_out),
                torch.arange(n_in) if entry.get("gather") else None,
                torch.arange(n_out) if "scatter" in entry else None,
                int(entry.get("scatter", n_out)),
            )
        for name, n in spec["norms"].items():
            plan.norms[name] = torch.arange(int(n))
        for name, (front, passed, after) in spec.get("pads", {}).items():
            plan.pads[name] = int(front), int(passed), int(after)
        return plan


def plan_slim(model: nn.Module, budget: MacBudget, whole_tensors: bool = False) -> SlimPlan:
    """Decides what stays under the masks' present patterns.

    Args:
        model: the model ``budget`` was recorded on.
        budget: its budget.
        whole_tensors: let every tensor keep its full width (gathers and scatters everywhere). MACs are the same; this
            is the way for models whose code does not bear narrower tensors.

    Raises:
        ValueError: the budget was recorded on another model, be it a copy of this one.
    """
    graph = budget.graph
    needed = budget.node_needs()
    computed = needed.clone()
    carried = carried_channels(graph, needed, whole_tensors)

    names = {m: name for name, m in model.named_modules()}
    if stranger := next((r.name for r in graph.layers if r.module is not None and r.module not in names), None):
        raise ValueError(
            f"the budget was recorded on another model: its layer {stranger!r} is not in this {type(model).__name__} "
            "(a copy is another model too). Make a MacBudget of the model that is to be slimmed"
        )
    plan = SlimPlan()
    for record, start in zip(graph.layers, budget.needs.literal_start, strict=True):
        if record.module is None:
            continue
        if record.groups > 1:
            live = computed[record.group_nodes]
            in_on = live.repeat_interleave(record.n_in // record.groups)
            out_on = live.repeat_interleave(record.n_out // record.groups)
        else:
            in_on = torch.ones(record.n_in, dtype=torch.bool)
            if start >= 0 and channel_masked(record):
                assert record.mask is not None
                in_on = record.mask.binary_mask().cpu() > 0
            out_on = computed[record.out_nodes]
        ids = record.calls[0].in_ids
        in_here = carried[ids] if ids is not None else torch.ones(record.n_in, dtype=torch.bool)
        out_here = carried[record.out_nodes]
        assert not bool((in_on & ~in_here).any()), f"{record.name} reads channels that are gone"
        in_index = None if torch.equal(in_on, in_here) else _positions(in_on, in_here)
        out_index = None if torch.equal(out_on, out_here) else _positions(out_on, out_here)
        plan.layers[names[record.module]] = LayerPlan(
            in_on.nonzero().flatten(), out_on.nonzero().flatten(), in_index, out_index, int(out_here.sum())
        )
    for module, calls in graph.norms.items():
        if calls[0] is not None:
            keep = carried[calls[0]]
            plan.norms[names[module]] = keep.nonzero().flatten()
    for pad, calls in graph.pads.items():
        if calls[0] is not None:
            first, last = pad.front, pad.front + pad.in_channels
            front, passed, after = (int(here.sum()) for here in carried[calls[0]].tensor_split((first, last)))
            plan.pads[names[pad]] = front, passed, after
    return plan


def apply_plan(model: nn.Module, plan: SlimPlan) -> nn.Module:
    """Shrinks a model in place by a plan (masks, where present, are dropped: the plan already holds their pattern).

    Raises:
        ValueError: the plan names a module the model lacks, or one of another type or size.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in [*plan.layers, *plan.norms, *plan.pads]:
        if name not in modules:
            raise ValueError(f"the slim spec names a module {name!r} that {type(model).__name__} does not have")
    for name, layer in masked_layers(model).items():
        cut = plan.layers.get(name)
        if layer.mask_granularity == "channel" and cut is not None and len(cut.in_keep) < layer.prune_mask.numel():
            layer.detach_mask()
        else:
            # Nothing of its inputs is removed (its mask does not count, or the recorded pass never ran it).
            layer.fold()
    for name, entry in plan.layers.items():
        layer = modules[name]
        kind = kind_of(layer)
        if kind is None:
            raise ValueError(
                f"the slim spec shrinks {name!r}, but it is a {type(layer).__name__}, no layer known to it"
            )
        n_in, n_out = kind.channels(layer)
        if len(entry.in_keep) > n_in or len(entry.out_keep) > n_out:
            raise ValueError(
                f"the slim spec gives {name!r} {len(entry.in_keep)} -> {len(entry.out_keep)} channels, but the dense "
                f"layer has only {n_in} -> {n_out}: it was made from another model"
            )
        shrink_layer(layer, kind, entry)
    for name, keep in plan.norms.items():
        _shrink_norm(modules[name], keep)
    for name, (front, passed, after) in plan.pads.items():
        pad = modules[name]
        if not isinstance(pad, ChannelPad) or passed > pad.in_channels or front + passed + after > pad.out_channels:
            raise ValueError(
                f"the slim spec pads {passed} channels to {front + passed + after} in {name!r}, which is {pad} here: "
                "it was made from another model"
            )
        pad.front, pad.in_channels, pad.out_channels = front, passed, front + passed + after
    guard_reparameterization(model)
    return model


def slim(
    model: nn.Module, example_inputs: Any, budget: MacBudget | None = None, more_examples: Sequence[Any] = ()
) -> nn.Module:
    """Returns a copy of the model without masks and without what they leave unread; the model itself is untouched.

    The copy holds plain layers (with gathers and scatters where a residual stream needs them), computes the same in
    evaluation mode (checked here on every example), and costs exactly ``budget.kept_macs()``. Masks of granularity
    ``weight`` are folded: scattered zeros cannot be removed.

    Args:
        model: masked model; its present binary patterns count, frozen or not.
        example_inputs: as for :class:`MacBudget`.
        budget: the model's budget, if there is one already.
        more_examples: as for :class:`MacBudget`. A model whose code branches on sizes or batches can differ at others
            than the examples'.

    Raises:
        ValueError: the model carries no mask.
        RuntimeError: the slimmed model does not compute the same (nothing wrong is returned).
    """
    small, _ = slim_with_plan(model, example_inputs, budget, more_examples)
    return small


def slim_with_plan(
    model: nn.Module, example_inputs: Any, budget: MacBudget | None = None, more_examples: Sequence[Any] = ()
) -> tuple[nn.Module, SlimPlan]:
    """:func:`slim`, with the plan whose :meth:`SlimPlan.spec` rebuilds the structure."""
    if not masked_layers(model):
        raise ValueError(f"{type(model).__name__} carries no mask: nothing says what to remove (see mask_model)")
    for name, layer in masked_layers(model).items():
        if not layer.mask_frozen and not bool(torch.isfinite(layer.prune_mask).all()):
            raise ValueError(f"layer {name!r} cannot be slimmed: {NOT_FINITE}")
    budget = budget or MacBudget(model, example_inputs, more_examples=more_examples)
    problem = ""
    for whole_tensors in (False, True):
        plan = plan_slim(model, budget, whole_tensors)
        small = apply_plan(copy.deepcopy(model), plan)
        problems = [_real_difference(model, small, example) for example in (example_inputs, *more_examples)]
        if not any(problems):
            return small, plan
        problem = next(filter(None, problems))
        logger.warning("narrow tensors do not suit %s (%s): keeping their widths", type(model).__name__, problem)
    raise RuntimeError(f"the slimmed {type(model).__name__} does not compute what the masked one does: {problem}")


def _real_difference(model: nn.Module, small: nn.Module, example: Any) -> str:
    """:func:`difference`, unless it is rounding that turned the order of proposals around: in float64 it does not."""
    problem = difference(model, small, example)
    return problem if problem and difference_in_double(model, small, example) else ""


def _positions(on: Tensor, here: Tensor) -> Tensor:
    """Where the channels ``on`` stand among those that are ``here``."""
    return (here.long().cumsum(0) - 1)[on]


def shrink_layer(layer: nn.Module, kind: Conv2dKind, entry: LayerPlan) -> None:
    """Cuts a dense layer in place, with the gather and the scatter of its plan."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    device = weight.device
    if (len(entry.in_keep), len(entry.out_keep)) != kind.channels(layer):
        kind.slice(layer, entry.in_keep.to(device), entry.out_keep.to(device))
        layer.slimmed = True  # type: ignore[assignment]  # for code that relies on the dense network's sizes
    if entry.in_index is None and entry.out_index is None:
        return
    layer.slimmed = True  # type: ignore[assignment]
    layer.__class__ = _SLIM[type(layer)]
    assert isinstance(layer, SlimLayer)
    layer.wire(
        entry.in_index.to(device) if entry.in_index is not None else None,
        entry.out_index.to(device) if entry.out_index is not None else None,
        entry.out_width,
    )


def _shrink_norm(norm: Any, keep: Tensor) -> None:
    if isinstance(norm, nn.PReLU) and norm.num_parameters == 1:
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(norm, name, None)
        if isinstance(value, Tensor):
            value.data = value.data.index_select(0, keep.to(value.device))
    setattr(norm, "num_parameters" if isinstance(norm, nn.PReLU) else "num_features", len(keep))
