"""The table of torch functions: what each of them does to the labels of its tensors.

A handler is a small function ``handler(labels, call)``. Functions that treat channels one by one pass the labels on;
additions and their like make new nodes that need their sources; views do to the labels what they do to the tensor.
A function without a handler is a barrier: it reads all the channels it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..verify import tensors_in
from .labels import Labels, compress


@dataclass
class Call:
    """A call of a torch function with at least one followed tensor among its arguments.

    Attributes:
        name: ``func.__name__``, or else its text.
        func, args, kwargs: the call itself.
        inputs: tensors among the arguments, in containers too.
        out: what it returned.
        outputs: tensors in that; at least one where a handler sees the call.
    """

    name: str
    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    out: Any
    outputs: list[Tensor]

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by its position or by one of its names."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)


Handler = Callable[[Labels, Call], None]

#: Function, or its ``__name__``, to handler.
HANDLERS: dict[Callable[..., Any] | str, Handler] = {}


def follow(labels: Labels, call: Call) -> None:
    """Labels the outputs of a call by the table."""
    if call.outputs:
        handler = HANDLERS.get(call.func) or HANDLERS.get(call.name, _unknown)
        handler(labels, call)
    else:
        labels.barrier(call.inputs, (), f"{call.name} takes values out of the graph")


# -- handlers


def _of_input(handler: Callable[[Labels, Call, Tensor], None]) -> Handler:
    """A handler that is given the label of the first tensor too; where that is not followed, the call is a barrier."""

    @functools.wraps(handler)
    def wrapped(labels: Labels, call: Call) -> None:
        ids = labels.ids(call.inputs[0])
        if ids is None:
            labels.barrier(call.inputs, call.outputs, None)
        else:
            handler(labels, call, ids)

    return wrapped


@_of_input
def _unknown(labels: Labels, call: Call, ids: Tensor) -> None:
    labels.barrier(call.inputs, call.outputs, f"{call.name} is not known to treat channels one by one")


@_of_input
def channelwise(labels: Labels, call: Call, ids: Tensor) -> None:
    """Every channel of the output comes from the same channel of the first tensor, and from nothing else.

    Further tensors (``clamp(min=tensor)``) take part channel by channel, as in :func:`elementwise`.
    """
    if len(call.inputs) > 1 and len(call.outputs) == 1:
        elementwise(labels, call)
    else:
        labels.pass_on(ids, call.inputs[0], *call.outputs)


@_of_input
def _cast(labels: Labels, call: Call, ids: Tensor) -> None:
    """Further tensors tell a type or a device, and no values."""
    labels.pass_on(ids, call.inputs[0], *call.outputs)


def elementwise(labels: Labels, call: Call) -> None:
    """All tensors are broadcast against each other; a channel of the output needs that channel of each of them."""
    if len(call.outputs) != 1:
        _unknown(labels, call)
        return
    (out,) = call.outputs
    followed = [_lift(ids, out.dim()) for t in call.inputs if (ids := labels.ids(t)) is not None]
    shape = torch.broadcast_shapes(*[ids.shape for ids in followed])
    for t in call.inputs:
        if labels.ids(t) is None:
            other = [1] * (out.dim() - t.dim()) + list(t.shape)
            if any(o > 1 and s > 1 for o, s in zip(other, shape, strict=True)):
                for ids in followed:
                    labels.fix(ids)
    merged = followed[0]
    if any(ids.shape != merged.shape or not torch.equal(ids, merged) for ids in followed[1:]):
        merged = labels.new_nodes(*shape)
        for ids in followed:
            labels.need(ids.expand(shape), merged)
            if ids.shape == shape:
                labels.couple(ids, merged)
            elif ids.numel() > 1:
                labels.fix(ids)
                labels.fix(merged)
    labels.label(out, merged)


def _where(labels: Labels, call: Call) -> None:
    """A choice, place by place. With the condition alone, the places' numbers: among them those of channels."""
    if len(call.args) + len(call.kwargs) == 1:
        labels.barrier(call.inputs, call.outputs, "where tells places by their numbers")
    else:
        elementwise(labels, call)


def _extremum(labels: Labels, call: Call) -> None:
    """``max`` and ``min``: of two tensors, or along a dimension."""
    of_two = len(call.outputs) == 1 and isinstance(call.argument(1), Tensor)
    (elementwise if of_two else _reduction)(labels, call)


def _concatenation(labels: Labels, call: Call) -> None:
    _join(labels, call.inputs, call.outputs[0], call.argument(1, "dim", "axis", default=0))


def _stack(labels: Labels, call: Call) -> None:
    (out,), dim = call.outputs, call.argument(1, "dim", default=0)
    dim %= out.dim()
    lifted = []
    for t in call.inputs:
        ids = labels.ids(t)
        view = t.unsqueeze(dim)
        if ids is not None:
            labels.label(view, ids.unsqueeze(dim))
        lifted.append(view)
    _join(labels, lifted, out, dim)


def _join(labels: Labels, inputs: Sequence[Tensor], out: Tensor, dim: int) -> None:
    dim %= out.dim()
    parts = [t for t in inputs if t.numel()]
    if not parts:
        return
    varying = {d for t in parts if (ids := labels.ids(t)) is not None for d in range(out.dim()) if ids.shape[d] > 1}
    joined: list[Tensor] = []
    for t in parts:
        ids = labels.ids(t)
        if ids is None:
            sizes = [t.shape[d] if d in varying or d == dim and not varying else 1 for d in range(out.dim())]
            ids = labels.new_nodes(*sizes)
            labels.read_all(ids)
        joined.append(ids)
    shape = [max(ids.shape[d] for ids in joined) for d in range(out.dim())]
    if dim in varying or not varying:
        joined = [
            ids.expand([t.shape[d] if d == dim else shape[d] for d in range(out.dim())])
            for t, ids in zip(parts, joined, strict=True)
        ]
        labels.label(out, compress(torch.cat(joined, dim)))
        return
    merged = labels.new_nodes(*shape)
    for ids in joined:
        labels.need(ids.expand(shape), merged)
        labels.couple(ids.expand(shape), merged)
    labels.label(out, merged)


def _constant(labels: Labels, call: Call) -> None:
    """New values that take a type or a device from a tensor."""
    labels.mark_derived(*call.outputs)


@_of_input
def _same_shape(labels: Labels, call: Call, ids: Tensor) -> None:
    """New values in the shape of a tensor, whose channels they are coupled to."""
    nodes = labels.new_nodes(*ids.shape)
    labels.couple(ids, nodes)
    labels.label(call.outputs[0], nodes)


@_of_input
def _resampling(labels: Labels, call: Call, ids: Tensor) -> None:
    """Pooling and interpolation over the last two dimensions; ``grid_sample`` reads its grid too."""
    if not ids.shape[-1] == ids.shape[-2] == 1:
        _unknown(labels, call)
        return
    for other in call.inputs[1:]:
        if other is not call.inputs[0] and (other_ids := labels.ids(other)) is not None:
            labels.read_all(other_ids)
    labels.pass_on(ids, call.inputs[0], *call.outputs)


@_of_input
def _pad(labels: Labels, call: Call, ids: Tensor) -> None:
    x, (out,) = call.inputs[0], call.outputs
    pad = list(call.argument(1, "pad"))
    for k in range(len(pad) // 2):
        dim = x.dim() - 1 - k
        before, after = pad[2 * k], pad[2 * k + 1]
        # A dimension without followed channels, where padding adds places and not channels.
        if not (before or after) or ids.shape[dim] == 1 and (x.shape[dim] != 1 or ids.numel() > 1):
            continue
        if before < 0 or after < 0:
            labels.barrier([x], [out], "a negative pad cuts channels off")
            return
        labels.fix(ids)
        parts = [ids.expand([x.shape[d] if d == dim else ids.shape[d] for d in range(x.dim())])]
        for count, front in ((before, True), (after, False)):
            shape = list(ids.shape)
            shape[dim] = count
            nodes = labels.new_nodes(*shape)
            labels.read_all(nodes)
            parts.insert(0, nodes) if front else parts.append(nodes)
        ids = torch.cat(parts, dim)
    labels.label(out, ids)


@_of_input
def _view(labels: Labels, call: Call, ids: Tensor) -> None:
    """Does to the labels what was done to the tensor; code with channel numbers in it fixes their places."""
    x, name, args, kwargs = call.inputs[0], call.name, call.args, call.kwargs
    for other in tensors_in((args[1:], kwargs), depth=3):
        if (other_ids := labels.ids(other)) is not None and name not in ("view_as", "reshape_as", "expand_as"):
            labels.read_all(other_ids)
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        labels.barrier([x], call.outputs, f"{name} reinterprets memory")
        return
    spread = ids.expand(x.shape)
    # Labels live on the CPU, and so must the index tensors that move them.
    rest, options = _on_cpu(list(args[1:])), _on_cpu(kwargs)
    moved = call.func(spread.contiguous() if name in ("view", "view_as") else spread, *rest, **options)
    pairs = list(zip(tensors_in(call.out, depth=2), tensors_in(moved, depth=2), strict=True))
    squeezed = [compress(m) for _, m in pairs]
    if name not in _SHAPE_FREE_VIEWS:
        kept_whole = all(s.numel() == ids.numel() and torch.equal(s.reshape(-1), ids.reshape(-1)) for s in squeezed)
        if name in ("view", "reshape"):
            shape = kwargs.get("shape", kwargs.get("size"))
            if shape is None:
                shape = args[1:] if len(args) > 2 or not isinstance(args[1], (tuple, list)) else args[1]
            dims = [d for d, s in enumerate(squeezed[0].shape) if s > 1]
            one = sum(s > 1 for s in ids.shape) == 1 == len(dims)
            if not (one and list(shape)[dims[0]] == -1):
                labels.fix(ids)
        elif not kept_whole:
            labels.fix(ids)
    for (t, _), label in zip(pairs, squeezed, strict=True):
        labels.label(t, label)


@_of_input
def _reduction(labels: Labels, call: Call, ids: Tensor) -> None:
    """Follows reductions along dimensions that no channel varies along."""
    x = call.inputs[0]
    # x.norm(p, dim) takes it third
    dim = call.argument(2 if call.name == "norm" else 1, "dim", "axis")
    named = not (dim is None or isinstance(dim, (Tensor, bool, str)))
    dims = sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)) if named else []
    if not dims or any(ids.shape[d] > 1 for d in dims):
        labels.barrier(call.inputs, call.outputs, f"{call.name} mixes channels")
        return
    if call.outputs[0].dim() < x.dim():
        for d in reversed(dims):
            ids = ids.squeeze(d)
    labels.pass_on(ids, x, *call.outputs)


@_of_input
def _along(labels: Labels, call: Call, ids: Tensor) -> None:
    """Normalisations and running sums along a dimension that no channel varies along."""
    dim = call.argument(1, "dim")
    if isinstance(dim, int) and ids.shape[dim] == 1:
        labels.pass_on(ids, call.inputs[0], *call.outputs)
    else:
        labels.barrier(call.inputs, call.outputs, f"{call.name} mixes channels")


def _lift(ids: Tensor, dim: int) -> Tensor:
    return ids.view([1] * (dim - ids.dim()) + list(ids.shape))


def _on_cpu(obj: Any) -> Any:
    """The arguments of an operation with their tensors on the CPU."""
    if isinstance(obj, Tensor):
        return obj.cpu()
    if isinstance(obj, (list, tuple)):
        return type(obj)(map(_on_cpu, obj))
    if isinstance(obj, dict):
        return {key: _on_cpu(value) for key, value in obj.items()}
    return slice(*map(_on_cpu, (obj.start, obj.stop, obj.step))) if isinstance(obj, slice) else obj


# -- the table


def register_op(function: Callable[..., Any] | str, handler: Handler = channelwise) -> None:
    """Teaches the channel graph what a function does to channels, so that it is no barrier any more.

    The function has to be one that torch shows to a ``TorchFunctionMode``: a torch function or tensor method, a
    custom operator (``torch.library``), or a Python function under ``torch.overrides.wrap_torch_function``. (For
    modules there is :func:`~mmitp.pruning.register_channelwise`.) A wrong handler is found out: the budget perturbs the
    channels that a random pattern drops, and keeps layers dense whose channels are read in another way.

    Args:
        function: the function, or its ``__name__`` (``'erfinv'`` for ``torch.erfinv``, ``Tensor.erfinv`` and every
            other function called so). The function itself comes first.
        handler: :func:`~mmitp.pruning.graph.channelwise` (the default: every channel of the first tensor by itself),
            :func:`~mmitp.pruning.graph.elementwise` (several tensors, broadcast), or one of your own,
            ``handler(labels, call)``, which labels ``call.outputs``; see :class:`~mmitp.pruning.graph.Labels`.

    Raises:
        ValueError: ``function`` is neither a function nor a name, or the handler is no function.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import MacBudget, mask_model, register_op
        >>> class Net(nn.Sequential):
        ...     def forward(self, x):
        ...         return self[1](torch.special.bessel_j0(self[0](x)))
        >>> net = mask_model(Net(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))
        >>> MacBudget(net, torch.randn(1, 3, 8, 8)).unfollowed
        {'Net': 'special_bessel_j0 is not known to treat channels one by one'}
        >>> register_op(torch.special.bessel_j0)
        >>> MacBudget(net, torch.randn(1, 3, 8, 8)).unfollowed
        {}
    """
    if not callable(function) and not (isinstance(function, str) and function):
        raise ValueError(f"register_op takes a function or its name, got {function!r}")
    if not callable(handler):
        raise ValueError(f"register_op needs a handler(labels, call) for {function!r}, got {handler!r}")
    HANDLERS[function] = handler


def _register(names: str | Iterable[str], handler: Handler) -> None:
    for name in names.split() if isinstance(names, str) else names:
        register_op(name, handler)


def _spellings(names: str) -> Iterable[str]:
    """A function's in-place and operator forms: ``add``, ``add_``, ``__add__``."""
    for name in names.split():
        yield from (name, f"{name}_", f"__{name}__")


_SHAPE_FREE_VIEWS = "permute transpose t squeeze unsqueeze swapaxes movedim flatten swapdims moveaxis".split()

#: They tell of a tensor, and read no values.
METADATA = frozenset(
    """size dim numel nelement ndimension stride is_contiguous is_floating_point is_complex element_size get_device
    storage_offset data_ptr __len__ __hash__ is_same_size register_hook __repr__ __format__ is_pinned is_shared
    is_signed is_inference __dir__ is_tensor""".split()
)

#: They make a tensor that takes a type and a device from another.
FACTORIES = frozenset(_spellings("new_zeros new_ones new_full new_empty new_tensor"))

_register(
    """relu relu_ relu6 leaky_relu leaky_relu_ rrelu elu elu_ celu selu gelu silu mish hardswish hardsigmoid hardtanh
    hardtanh_ sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid threshold threshold_ exp exp_ log sqrt rsqrt
    square reciprocal sign erf round floor ceil clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip
    clip_ nan_to_num dropout dropout_ dropout2d feature_dropout alpha_dropout contiguous clone detach detach_ float half
    double bfloat16 type cpu cuda requires_grad_ positive __pos__ isnan isinf isfinite logical_not bool int
    long""",
    channelwise,
)
_register(_spellings("neg abs"), channelwise)
_register("type_as to", _cast)
_register(
    _spellings(
        """add sub mul div true_divide maximum minimum lerp addcmul addcdiv pow atan2 fmod remainder masked_fill
        gt lt ge le eq ne logical_and logical_or rsub multiply subtract divide fmax fmin hypot copysign xlogy logaddexp
        float_power floor_divide heaviside greater less"""
    ),
    elementwise,
)
_register(
    """__radd__ __rsub__ __rmul__ __rdiv__ __rpow__ __iadd__ __isub__ __imul__ __idiv__ __ipow__
    __truediv__ __rtruediv__ __itruediv__ __and__ __or__""",
    elementwise,
)
_register("where", _where)
_register("max min", _extremum)
_register("cat concat concatenate", _concatenation)
_register("stack", _stack)
_register(FACTORIES, _constant)
_register("zeros_like ones_like empty_like full_like rand_like randn_like", _same_shape)
_register(
    """max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d
    adaptive_max_pool2d_with_indices lp_pool2d interpolate upsample upsample_nearest upsample_bilinear
    boolean_dispatch fn grid_sample""",
    _resampling,
)
_register("pad", _pad)
_register(_SHAPE_FREE_VIEWS, _view)
_register(
    """view reshape view_as reshape_as __getitem__ chunk split split_with_sizes tensor_split narrow select unbind
    expand expand_as repeat flip roll unflatten index_select repeat_interleave channel_shuffle
    native_channel_shuffle""",
    _view,
)
_register("mean sum amax amin var std norm logsumexp prod any all argmax argmin", _reduction)
_register("softmax log_softmax _softmax _log_softmax cumsum cumprod", _along)
_register("cumsum_ cumprod_", _along)
