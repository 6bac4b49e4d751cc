"""The channel graph of a recorded forward pass: who reads whose channels.

Every channel of every layer's output is a node. Each tensor of the pass is labelled with the nodes its elements belong
to: an integer array that broadcasts to the tensor's shape, so that views, permutations, flattenings and shuffles are
followed by doing to the labels what was done to the tensor. Operations that treat channels one by one pass the labels
on; additions and their like make new nodes that need their sources; everything else is a barrier that reads all the
channels it is given. Nothing is taken from names, and what cannot be followed stays whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from .layers import ChannelPad, Conv2dKind, is_channelwise, kind_of
from .masks import MaskedLayer
from .products import Product, ProductCounter, unfused
from .rng import kept_rng
from .verify import call_model, eval_mode, tensors_in

_UNARY = frozenset(
    """relu relu_ relu6 leaky_relu leaky_relu_ rrelu elu elu_ celu selu gelu silu mish hardswish hardsigmoid hardtanh
    hardtanh_ sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid threshold threshold_ exp exp_ log sqrt rsqrt
    square reciprocal abs neg sign erf round floor ceil clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip
    clip_ nan_to_num dropout
    dropout_ dropout2d feature_dropout alpha_dropout contiguous clone detach detach_ float half double bfloat16 to type
    type_as cpu cuda requires_grad_ positive __neg__ __pos__ __abs__ isnan isinf isfinite logical_not bool int
    long""".split()
)
_ELEMENTWISE = frozenset(
    """add sub mul div true_divide maximum minimum where lerp addcmul addcdiv pow atan2 fmod remainder masked_fill
    gt lt ge le eq ne logical_and logical_or rsub multiply subtract divide fmax fmin hypot copysign xlogy logaddexp
    float_power floor_divide heaviside greater less""".split()
)
#: Tensor arguments of these tell a type or a place, and no values.
_EXEMPLARY = frozenset(["type_as", "to"])
_POOLING = frozenset(
    """max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d
    adaptive_max_pool2d_with_indices lp_pool2d interpolate upsample upsample_nearest upsample_bilinear
    boolean_dispatch fn""".split()
)
_REDUCTIONS = frozenset("mean sum amax amin max min var std norm logsumexp prod any all argmax argmin".split())
_ALONG = frozenset("softmax log_softmax cumsum cumprod".split())
_LIKE = frozenset("zeros_like ones_like empty_like full_like rand_like randn_like".split())
_FACTORIES = frozenset("new_zeros new_ones new_full new_empty new_tensor".split())
_SHAPE_FREE_VIEWS = frozenset(
    "permute transpose t squeeze unsqueeze swapaxes movedim flatten swapdims moveaxis".split()
)
_VIEWS = _SHAPE_FREE_VIEWS | frozenset(
    """view reshape view_as reshape_as __getitem__ chunk split split_with_sizes tensor_split narrow select unbind
    expand expand_as repeat flip roll unflatten index_select repeat_interleave channel_shuffle
    native_channel_shuffle""".split()
)
_METADATA = frozenset(
    """size dim numel nelement ndimension stride is_contiguous is_floating_point is_complex element_size get_device
    storage_offset data_ptr __len__ __hash__ is_same_size register_hook __repr__ __format__ is_pinned is_shared
    is_signed is_inference __dir__ is_tensor""".split()
)


@dataclass
class LayerCall:
    """One execution of a layer: labels of its input (None: of unknown or constant origin) and what it cost."""

    in_ids: Tensor | None
    pair_macs: int
    input_macs: int


@dataclass
class LayerRecord:
    """A convolution, transposed, deformable convolution or linear layer of the recorded pass."""

    name: str
    module: nn.Module | None  # None: a functional call
    kind: Conv2dKind | None
    n_in: int
    n_out: int
    groups: int = 1
    out_nodes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    group_nodes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    calls: list[LayerCall] = field(default_factory=list)
    note: str = ""
    own_macs: int = 0  # of a functional call, all of it stays
    held: bool = False  # all its channels stay
    open: bool = False  # its mask does not count, and all its input channels stay
    reads_image: bool = False  # no other layer lies between the model's input and this one

    @property
    def pair_macs(self) -> int:
        """MACs a connected (input, output) pair of channels costs over all calls."""
        return sum(call.pair_macs for call in self.calls)

    @property
    def input_macs(self) -> int:
        return sum(call.input_macs for call in self.calls)

    @property
    def dense_macs(self) -> int:
        return self.pair_macs * self.n_in * self.n_out // self.groups + self.input_macs * self.n_in + self.own_macs

    @property
    def mask(self) -> MaskedLayer | None:
        """The layer, if it carries a mask that counts."""
        return self.module if isinstance(self.module, MaskedLayer) and not self.open else None


@dataclass
class ChannelGraph:
    """Nodes (channels) with their needs, the layers, and which channels have to stay side by side.

    Attributes:
        layers: in order of first execution.
        n_nodes: number of nodes.
        edges: ``(2, E)``; the source is needed where the destination is.
        always: ``(n_nodes,)`` bool, nodes a barrier or the model's output reads.
        rigid: ``(n_nodes,)`` bool, nodes whose place in the tensor is fixed by code with channel numbers in it.
        together: ``(2, P)`` pairs of nodes that the unchanged code carries or drops only together.
        norms: per-channel modules (BatchNorm, InstanceNorm, PReLU) with the labels of every call.
        pads: :class:`ChannelPad` modules with the labels of the output of every call.
        unfollowed: name -> reason, for what was kept whole or could not be counted.
    """

    layers: list[LayerRecord]
    n_nodes: int
    edges: Tensor
    always: Tensor
    rigid: Tensor
    together: Tensor
    norms: dict[nn.Module, list[Tensor | None]]
    pads: dict[ChannelPad, list[Tensor | None]]
    unfollowed: dict[str, str]


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold; masks may be shared."""
    named = [(name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    owners = Counter(id(p) for name, p in named if name != "prune_mask")
    return {p for p, n in owners.items() if n > 1}


def record_graph(model: nn.Module, example_inputs: Any, more_examples: Sequence[Any] = ()) -> ChannelGraph:
    """Records evaluation-mode forward passes and returns their common channel graph.

    Args:
        model: the model.
        example_inputs: of the size that operations are counted at.
        more_examples: inputs of other sizes or batches. A channel that any of the passes needs is needed.

    Raises:
        ValueError: the pass runs no convolution or linear layer, or returns no tensor.
    """
    recorder = _Recorder(model)
    try:
        with eval_mode(model), kept_rng(), torch.no_grad(), recorder.hooks(), unfused():
            for example in (example_inputs, *more_examples):
                out = recorder.run(example)
                if next(tensors_in(out), None) is None:
                    kind = type(out).__name__
                    raise ValueError(f"the forward pass of {type(model).__name__} returned no tensor ({kind})")
    finally:
        recorder.clear()
    return recorder.finish()


class _Recorder(TorchFunctionMode):
    """Labels tensors during a pass. Labels are kept by tensor identity, with a strong reference to each tensor.

    Operations are those of the first pass; further ones only add what they need.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {m: name for name, m in model.named_modules()}
        self.depth = 0
        self.n_nodes = 0
        self.layers: dict[Any, LayerRecord] = {}
        self.norms: dict[nn.Module, list[Tensor | None]] = {}
        self.pads: dict[ChannelPad, list[Tensor | None]] = {}
        self.edges: list[Tensor] = []
        self.together: list[Tensor] = []
        self.always: list[Tensor] = []
        self.rigid: list[Tensor] = []
        self.unfollowed: dict[str, str] = {}
        self._ids: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._stack: list[str] = []
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._made_of: dict[int, tuple[Tensor, str]] = {}  # views and the like of one weight, with its name
        self._shared = shared_parameters(model)
        self._read_parameters: set[int] = set()  # by functions outside of the layers that own them
        self._storages: dict[int, list[Tensor]] = {}
        self._image: set[int] = set()  # ids of tensors that no layer lies before
        self._ran: set[nn.Module] = set()
        self._counting = True
        self._counter = ProductCounter([])

    def run(self, example: Any) -> Any:
        self.clear()
        self._counter = ProductCounter(tensors_in(example))
        for tensor in tensors_in(example):
            self.mark_derived(tensor)
            self._image.add(id(tensor))
        with self._counter, self:
            out = call_model(self.model, example)
        self.count_hidden()
        self._name_unread_weights()
        self._counting = False
        return out

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """While the recorder computes labels, which is no work of the model's."""
        self._counter.paused = True
        try:
            yield
        finally:
            self._counter.paused = False

    # -- labels

    def ids(self, tensor: Any) -> Tensor | None:
        entry = self._ids.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return entry[1] if entry is not None else None

    def is_derived(self, tensor: Tensor) -> bool:
        return id(tensor) in self._ids

    def label(self, tensor: Tensor, ids: Tensor) -> None:
        assert ids.dim() == tensor.dim(), (ids.shape, tensor.shape)
        self._remember(tensor, ids)

    def mark_derived(self, tensor: Tensor) -> None:
        """Known to come from the input, with no channel to follow."""
        if id(tensor) not in self._ids:
            self._remember(tensor, None)

    def _remember(self, tensor: Tensor, ids: Tensor | None) -> None:
        if id(tensor) not in self._ids and tensor.layout == torch.strided:
            self._storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._ids[id(tensor)] = (tensor, ids)

    def has_aliases(self, tensor: Tensor) -> bool:
        """Whether another tensor of the pass shares the memory, and would change with an in-place operation."""
        if tensor.layout != torch.strided:
            return False
        return any(t is not tensor for t in self._storages.get(tensor.untyped_storage().data_ptr(), ()))

    def new_nodes(self, *shape: int) -> Tensor:
        size = 1
        for s in shape:
            size *= s
        nodes = torch.arange(self.n_nodes, self.n_nodes + size).view(shape)
        self.n_nodes += size
        return nodes

    def need(self, source: Tensor, destination: Tensor) -> None:
        self.edges.append(torch.stack([source.reshape(-1), destination.reshape(-1)]))

    def tie(self, a: Tensor, b: Tensor) -> None:
        self.together.append(torch.stack([a.reshape(-1), b.reshape(-1)]))

    def read_all(self, ids: Tensor) -> None:
        self.always.append(ids.reshape(-1).unique())

    def fix(self, ids: Tensor) -> None:
        self.rigid.append(ids.reshape(-1).unique())

    def clear(self) -> None:
        self._ids.clear()
        self._storages.clear()
        self._image.clear()
        self._made_of.clear()

    def mark_image(self, sources: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """What is made of the input alone, without a layer, is the image still."""
        derived = [t for t in sources if self.is_derived(t)]
        matrix = any(id(t) in self._parameters and _is_matrix(t) for t in sources)
        image = bool(derived) and all(id(t) in self._image for t in derived) and not matrix
        for t in outputs:
            if image:
                self.mark_derived(t)
                self._image.add(id(t))
            else:
                self._image.discard(id(t))

    # -- modules

    def hooks(self) -> _Hooks:
        return _Hooks(self)

    def on_atom(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors = list(tensors_in((args, kwargs)))
        if not tensors or not isinstance(output, Tensor):
            self.barrier(tensors, tensors_in(output), f"module {self.names[module]!r} returns no plain tensor")
            return
        kind = kind_of(module)
        for other in tensors[1:]:
            if (ids := self.ids(other)) is not None:
                self.read_all(ids)
        if kind is not None:
            self.on_layer(module, kind, tensors[0], output)
        elif is_channelwise(module):
            ids = self.ids(tensors[0])
            if ids is None:
                self.mark_derived(output)
            else:
                self.pass_on(ids, tensors[0], output)
        elif isinstance(module, ChannelPad):
            self.on_channel_pad(module, tensors[0], output)
        else:
            self.on_norm(module, tensors[0], output)
        if kind is None:
            self.mark_image(tensors[:1], [output])

    def on_channel_pad(self, module: ChannelPad, x: Tensor, out: Tensor) -> None:
        """Zero channels are nodes without a source; the others pass through."""
        ids = self.ids(x)
        calls = self.pads.setdefault(module, [])
        if ids is None or not _only_dim(ids, 1):
            self.barrier([x], [out], f"{self.names[module]!r} pads a tensor whose channels are not followed")
            self.note_call(calls, None)
            return
        after = module.out_channels - module.front - module.in_channels
        ids = ids.expand(1, module.in_channels, 1, 1)
        ids = torch.cat([self.new_nodes(1, module.front, 1, 1), ids, self.new_nodes(1, after, 1, 1)], 1)
        self.note_call(calls, ids)
        self.label(out, ids)

    def on_norm(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        ids = self.ids(x)
        if ids is not None and not _only_dim(ids, 1):
            self.barrier([x], [out], f"{self.names[module]!r} normalises along more than one followed dimension")
            ids = None
        if ids is not None:
            ids = ids.expand([s if d == 1 else 1 for d, s in enumerate(x.shape)])
            if self._shares_parameters(module):
                self.fix(ids)
        self.note_call(self.norms.setdefault(module, []), ids)
        if ids is None:
            self.mark_derived(out)
        else:
            self.label(out, ids)

    def note_call(self, calls: list[Tensor | None], ids: Tensor | None) -> None:
        """A module that runs several times has one width: its channels stay or go together, or all stay."""
        calls.append(ids.reshape(-1) if ids is not None else None)
        if ids is not None and calls[0] is not None:
            self.tie(calls[0], ids)
        if None in calls:
            for known in calls:
                if known is not None:
                    self.fix(known)

    def _shares_parameters(self, module: nn.Module) -> bool:
        return any(id(p) in self._shared for p in module.parameters())

    def on_layer(self, module: nn.Module, kind: Conv2dKind, x: Tensor, out: Tensor) -> None:
        name = self.names[module]
        before = self.n_nodes
        n_in, n_out = kind.channels(module)
        record = self.layers.get(module)
        if record is None:
            record = LayerRecord(name, module, kind, n_in, n_out, kind.groups(module))
            record.out_nodes = self.new_nodes(n_out)
            if record.groups > 1:
                record.group_nodes = self.new_nodes(record.groups)
            self.layers[module] = record
        in_dim = x.dim() - 1 if kind.linear else x.dim() - 3
        ids = self.ids(x)
        if ids is None and not self.is_derived(x):
            self.unfollowed[name] = "its input is of unknown origin, so everything before it stays whole"
            self.read_all(torch.arange(before))
        if ids is not None and not _only_dim(ids, in_dim):
            self.read_all(ids)
            self.fix(ids)
            self.unfollowed[name] = "its input mixes followed dimensions"
            ids = None
        record.reads_image |= id(x) in self._image
        ids = ids.expand([n_in if d == in_dim else 1 for d in range(x.dim())]).reshape(-1) if ids is not None else None
        macs = (kind.pair_macs(module, x, out), kind.input_macs(module, x, out)) if self._counting else (0, 0)
        record.calls.append(LayerCall(ids, *macs))
        if ids is not None and record.calls[0].in_ids is not None:
            self.tie(record.calls[0].in_ids, ids)
        if any(call.in_ids is None for call in record.calls):
            for call in record.calls:
                if call.in_ids is not None:
                    self.fix(call.in_ids)
        if self._shares_parameters(module):
            self.hold(record, "another module shares its parameters: counted, stays dense")
        elif kind.whole(module):
            self.hold(record, "its structure forbids removing single channels: counted, stays dense")
        call_out = self.new_nodes(n_out)
        self.need(record.out_nodes, call_out)
        self.tie(record.out_nodes, call_out)
        if record.groups > 1:
            group = record.group_nodes
            self.need(group.repeat_interleave(n_out // record.groups), call_out)
            if ids is not None:
                self.need(ids, group.repeat_interleave(n_in // record.groups))
        out_dim = out.dim() - 1 if kind.linear else out.dim() - 3
        self.label(out, call_out.view([n_out if d == out_dim else 1 for d in range(out.dim())]))

    def hold(self, record: LayerRecord, reason: str) -> None:
        """Keeps all channels of a layer."""
        record.held = True
        self.unfollowed[record.name] = reason
        for nodes in (record.out_nodes, record.group_nodes, *[call.in_ids for call in record.calls]):
            if nodes is not None and len(nodes):
                self.read_all(nodes)

    def on_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module whose output no recorded operation explains read its inputs behind our back."""
        if any(not self.is_derived(t) and id(t) not in self._parameters for t in tensors_in(output)):
            tagged = [t for t in tensors_in((args, kwargs)) if self.ids(t) is not None]
            if tagged:
                self.barrier(
                    tagged,
                    tensors_in(output),
                    f"module {self.names[module]!r} runs operations torch cannot show, and does not count",
                )

    # -- functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        name = getattr(func, "__name__", str(func))
        inputs = list(tensors_in((args, kwargs), depth=3))
        self.count_hidden()
        out = func(*args, **kwargs)
        with self.unseen():
            self._on_call(name, func, args, kwargs, inputs, out)
        return out

    def _on_call(
        self,
        name: str,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        out: Any,
    ) -> None:
        products = self._counter.take()
        if name == "__get__" or name in _METADATA:
            if isinstance(out, Tensor) and inputs:
                if name := self._weight_name(inputs[0]):
                    self._made_of[id(out)] = out, name
                self.on_attribute(getattr(getattr(func, "__self__", None), "__name__", ""), inputs[0], out)
            return
        if name == "__set__":
            self.barrier(inputs, [], "assignment to a tensor attribute")
            return
        outputs = list(tensors_in(out, depth=3))
        if name.strip("_") not in _FACTORIES:
            self._read_parameters.update(id(t) for t in inputs if id(t) in self._parameters)
        labelled = [t for t in inputs if self.ids(t) is not None]
        if products:
            self.count(name.strip("_"), inputs, products)
            self.barrier(labelled, outputs, None)
        elif labelled and any(o is i for o in outputs for i in inputs) and self._writes_into_alias(inputs, labelled):
            self.barrier(labelled, [t for t in outputs if self.ids(t) is None], f"{name} writes into a shared tensor")
        elif labelled:
            self.on_function(name, func, args, kwargs, inputs, labelled, out, outputs)
        elif any(self.is_derived(t) for t in inputs):
            for t in outputs:
                self.mark_derived(t)
            self.mark_image(inputs, outputs)
        elif len(names := [name for t in inputs if (name := self._weight_name(t))]) == 1:
            self._made_of.update((id(t), (t, names[0])) for t in outputs)
        self.name_unknown(name.strip("_"))

    def on_attribute(self, name: str, x: Tensor, out: Tensor) -> None:
        ids = self.ids(x)
        if ids is not None and name in ("T", "mT", "H", "mH") and x.dim() == 2:
            self.label(out, ids.t())
        elif ids is not None and name == "mT":
            self.label(out, ids.transpose(-1, -2))
        elif ids is not None and name == "data":
            self.label(out, ids)
        elif ids is not None:
            self.barrier([x], [out], None)
        elif self.is_derived(x):
            self.mark_derived(out)
            self.mark_image([x], [out])

    # -- work that no layer's formula counts

    def _module(self) -> str:
        return (self._stack and self._stack[-1]) or type(self.model).__name__

    def count(self, function: str, inputs: Sequence[Tensor], products: Sequence[Product]) -> None:
        """Products with weights outside of the known layers: counted, never pruned."""
        if not self._counting:
            return
        weights = [name for t in inputs if t.dim() > 1 and (name := self._weight_name(t))]
        place = (self._stack and self._stack[-1]) or "model"
        name = f"{weights[0] if len(weights) == 1 else f'{place}.{function}'} ({function})"
        record = self.layers.get(name)
        if record is None:
            first = products[0]
            record = LayerRecord(name, None, None, first.n_in, first.n_out, note="called as a function")
            record.out_nodes = self.new_nodes(record.n_out)
            record.calls.append(LayerCall(None, 0, 0))
            self.layers[name] = record
            self.unfollowed[name] = "called as a function with a weight of its own: counted, stays dense"
        record.own_macs += sum(p.macs for p in products)

    def _weight_name(self, tensor: Tensor) -> str:
        made_of = self._made_of.get(id(tensor))
        return self._parameters.get(id(tensor), made_of[1] if made_of is not None else "")

    def count_hidden(self) -> None:
        """Products since the last recorded function, which nothing but the dispatcher has seen."""
        if products := self._counter.take():
            self.count("hidden", (), products)
        self.name_unknown("")

    def name_unknown(self, function: str) -> None:
        for operator in self._counter.take_unknown():
            self.unfollowed[f"{self._module()} ({function or operator})"] = (
                f"{operator} multiplies by a weight in a way unknown here: not counted"
            )

    def _name_unread_weights(self) -> None:
        """Weights that a module which ran keeps, and no operation of torch's read, may have gone to foreign code."""
        for module in self._ran:
            for name, p in module.named_parameters(recurse=False):
                if _is_matrix(p) and not self._counter.was_read(p):
                    self.unfollowed.setdefault(
                        ".".join(filter(None, (self.names[module], name))),
                        "no operation of torch read this weight: if other code multiplies by it, that is not counted",
                    )

    def _writes_into_alias(self, inputs: list[Tensor], labelled: list[Tensor]) -> bool:
        """Whether other tensors take part in an operation in place on a tensor with views, which do not know of it."""
        return any(t is not inputs[0] for t in labelled) and self.has_aliases(inputs[0])

    def barrier(self, inputs: Sequence[Tensor], outputs: Any, reason: str | None) -> None:
        for t in inputs:
            if (ids := self.ids(t)) is not None:
                self.read_all(ids)
                self.fix(ids)
        for t in outputs:
            self._remember(t, None)
            self._image.discard(id(t))
        if reason is not None:
            self.unfollowed.setdefault(self._module(), reason)

    def on_function(
        self,
        name: str,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        labelled: list[Tensor],
        out: Any,
        outputs: list[Tensor],
    ) -> None:
        base = name.strip("_")
        for prefix in ("r", "i"):
            if name.startswith("__" + prefix) and base[1:] in ("add", "sub", "mul", "div", "truediv", "pow"):
                base = base[1:]
        base = {"truediv": "div", "and": "logical_and", "or": "logical_or"}.get(base, base)
        x = inputs[0]
        ids = self.ids(x)
        if not outputs:
            self.barrier(labelled, [], f"{name} takes values out of the graph")
        elif len(outputs) == 1 and (
            base in _ELEMENTWISE or base in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor)
        ):
            self.on_elementwise(inputs, outputs[0])
        elif base in ("cat", "concat", "concatenate") and len(outputs) == 1:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            self.on_cat(inputs, outputs[0], dim)
        elif base == "stack":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self.on_stack(inputs, outputs[0], dim)
        elif base in _FACTORIES:
            for t in outputs:
                self.mark_derived(t)
        elif ids is None:
            self.barrier(labelled, outputs, None)
        elif name in _UNARY or base in _UNARY and base in ("neg", "abs"):
            if len(inputs) > 1 and name not in _EXEMPLARY and len(outputs) == 1:
                self.on_elementwise(inputs, outputs[0])  # clamp(min=tensor)
            else:
                self.pass_on(ids, x, *outputs)
        elif base in _LIKE:
            nodes = self.new_nodes(*ids.shape)
            self.tie(ids, nodes)
            self.label(outputs[0], nodes)
        elif (base in _POOLING or base == "grid_sample") and ids.shape[-1] == ids.shape[-2] == 1:
            for other in labelled:
                if other is not x:
                    self.read_all(self.ids(other))  # type: ignore[arg-type]
            self.pass_on(ids, x, *outputs)
        elif base == "pad":
            self.on_pad(x, ids, args, kwargs, outputs[0])
        elif name in _VIEWS:
            self.on_view(name, func, args, kwargs, x, ids, out)
        elif base in _REDUCTIONS:
            self.on_reduction(func, args, kwargs, x, ids, outputs)
        elif base in _ALONG:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if isinstance(dim, int) and ids.shape[dim] == 1:
                self.pass_on(ids, x, *outputs)
            else:
                self.barrier(labelled, outputs, f"{name} mixes channels")
        else:
            self.barrier(labelled, outputs, f"{name} is not known to treat channels one by one")

    def pass_on(self, ids: Tensor, x: Tensor, *outputs: Tensor) -> None:
        for t in outputs:
            if t.dim() == ids.dim():
                self.label(t, ids)
            else:
                self.barrier([x], [t], None)

    def on_elementwise(self, inputs: list[Tensor], out: Tensor) -> None:
        labels = [(t, _lift(ids, out.dim())) for t in inputs if (ids := self.ids(t)) is not None]
        shape = torch.broadcast_shapes(*[ids.shape for _, ids in labels])
        for t in inputs:
            if self.ids(t) is None:
                other = [1] * (out.dim() - t.dim()) + list(t.shape)
                if any(o > 1 and s > 1 for o, s in zip(other, shape, strict=True)):
                    for _, ids in labels:
                        self.fix(ids)
        merged = labels[0][1]
        if any(ids.shape != merged.shape or not torch.equal(ids, merged) for _, ids in labels[1:]):
            merged = self.new_nodes(*shape)
            for _, ids in labels:
                self.need(ids.expand(shape), merged)
                if ids.shape == shape:
                    self.tie(ids, merged)
                elif ids.numel() > 1:
                    self.fix(ids)
                    self.fix(merged)
        self.label(out, merged)

    def on_cat(self, inputs: list[Tensor], out: Tensor, dim: int) -> None:
        dim %= out.dim()
        parts = [t for t in inputs if t.dim() == out.dim()]  # torch.cat skips empty one-dimensional tensors
        varying = {d for t in parts if (ids := self.ids(t)) is not None for d in range(out.dim()) if ids.shape[d] > 1}
        labels: list[Tensor] = []
        for t in parts:
            ids = self.ids(t)
            if ids is None:
                sizes = [t.shape[d] if d in varying or d == dim and not varying else 1 for d in range(out.dim())]
                ids = self.new_nodes(*sizes)
                self.read_all(ids)
            labels.append(ids)
        shape = [max(ids.shape[d] for ids in labels) for d in range(out.dim())]
        if dim in varying or not varying:
            labels = [
                ids.expand([t.shape[d] if d == dim else shape[d] for d in range(out.dim())])
                for t, ids in zip(parts, labels, strict=True)
            ]
            self.label(out, _compress(torch.cat(labels, dim)))
            return
        merged = self.new_nodes(*shape)
        for ids in labels:
            self.need(ids.expand(shape), merged)
            self.tie(ids.expand(shape), merged)
        self.label(out, merged)

    def on_stack(self, inputs: list[Tensor], out: Tensor, dim: int) -> None:
        dim %= out.dim()
        lifted = []
        for t in inputs:
            ids = self.ids(t)
            view = t.unsqueeze(dim)
            if ids is not None:
                self.label(view, ids.unsqueeze(dim))
            lifted.append(view)
        self.on_cat(lifted, out, dim)

    def on_pad(self, x: Tensor, ids: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        pad = list(args[1] if len(args) > 1 else kwargs["pad"])
        for k in range(len(pad) // 2):
            dim = x.dim() - 1 - k
            before, after = pad[2 * k], pad[2 * k + 1]
            # A dimension without followed channels, where padding adds places and not channels.
            if not (before or after) or ids.shape[dim] == 1 and (x.shape[dim] != 1 or ids.numel() > 1):
                continue
            if before < 0 or after < 0:
                self.barrier([x], [out], "a negative pad cuts channels off")
                return
            self.fix(ids)
            parts = [ids.expand([x.shape[d] if d == dim else ids.shape[d] for d in range(x.dim())])]
            for count, front in ((before, True), (after, False)):
                shape = list(ids.shape)
                shape[dim] = count
                nodes = self.new_nodes(*shape)
                self.read_all(nodes)
                parts.insert(0, nodes) if front else parts.append(nodes)
            ids = torch.cat(parts, dim)
        self.label(out, ids)

    def on_view(
        self,
        name: str,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        x: Tensor,
        ids: Tensor,
        out: Any,
    ) -> None:
        """Does to the labels what was done to the tensor; code with channel numbers in it fixes their places."""
        for other in tensors_in((args[1:], kwargs), depth=3):
            if (other_ids := self.ids(other)) is not None and name not in ("view_as", "reshape_as", "expand_as"):
                self.read_all(other_ids)
        spread = ids.expand(x.shape)
        if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
            self.barrier([x], tensors_in(out), f"{name} reinterprets memory")
            return
        # Labels live on the CPU, and so must the index tensors that move them.
        rest, options = _on_cpu(list(args[1:])), _on_cpu(kwargs)
        moved = func(spread.contiguous() if name in ("view", "view_as") else spread, *rest, **options)
        pairs = list(zip(tensors_in(out, depth=2), tensors_in(moved, depth=2), strict=True))
        squeezed = [_compress(m) for _, m in pairs]
        if name not in _SHAPE_FREE_VIEWS:
            kept_whole = all(s.numel() == ids.numel() and torch.equal(s.reshape(-1), ids.reshape(-1)) for s in squeezed)
            if name in ("view", "reshape"):
                shape = kwargs.get("shape", kwargs.get("size"))
                if shape is None:
                    shape = args[1:] if len(args) > 2 or not isinstance(args[1], (tuple, list)) else args[1]
                dims = [d for d, s in enumerate(squeezed[0].shape) if s > 1]
                one = sum(s > 1 for s in ids.shape) == 1 == len(dims)
                if not (one and list(shape)[dims[0]] == -1):
                    self.fix(ids)
            elif not kept_whole:
                self.fix(ids)
        for (t, _), label in zip(pairs, squeezed, strict=True):
            self.label(t, label)

    def on_reduction(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        x: Tensor,
        ids: Tensor,
        outputs: list[Tensor],
    ) -> None:
        dim = kwargs.get("dim", kwargs.get("axis", _positional_dim(func, args)))
        if dim is None or isinstance(dim, (Tensor, bool, str)):
            inputs = [x, dim] if isinstance(dim, Tensor) else [x]
            self.barrier(inputs, outputs, f"{getattr(func, '__name__', func)} mixes channels")
            return
        dims = sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim))
        if any(ids.shape[d] > 1 for d in dims) or not dims:
            self.barrier([x], outputs, f"{getattr(func, '__name__', func)} mixes channels")
            return
        label = ids
        if outputs[0].dim() < x.dim():
            for d in reversed(dims):
                label = label.squeeze(d)
        self.pass_on(label, x, *outputs)

    # -- result

    def finish(self) -> ChannelGraph:
        def flags(chunks: list[Tensor]) -> Tensor:
            out = torch.zeros(self.n_nodes, dtype=torch.bool)
            if chunks:
                out[torch.cat(chunks)] = True
            return out

        layers = list(self.layers.values())
        if not layers:
            raise ValueError(f"the forward pass of {type(self.model).__name__} ran no convolution or linear layer")
        for record in layers:
            # Masks are read from outside too, by a MaskBank.
            own = record.module.named_parameters() if record.module is not None else ()
            if any(id(p) in self._read_parameters for name, p in own if name != "prune_mask"):
                self.hold(record, "its weight is also read elsewhere: counted, stays dense (exclude it from masking)")
        empty = torch.empty(2, 0, dtype=torch.long)
        called = {record.module for record in layers}
        self._open_useless_masks()
        for name, module in self.model.named_modules():
            if isinstance(module, MaskedLayer) and module not in called:
                self.unfollowed[name] = "did not run in the recorded pass: not counted, stays dense"
        return ChannelGraph(
            layers,
            self.n_nodes,
            torch.cat(self.edges, 1) if self.edges else empty,
            flags(self.always),
            flags(self.rigid),
            torch.cat(self.together, 1) if self.together else empty,
            self.norms,
            self.pads,
            self.unfollowed,
        )

    def _open_useless_masks(self) -> None:
        masked = [(r, r.module) for r in self.layers.values() if isinstance(r.module, MaskedLayer)]
        training = any(layer.prune_mask.requires_grad for _, layer in masked)
        for record, layer in masked:
            if record.held:
                record.open = True
            elif record.reads_image and not layer.asked_for:
                record.open = True
                self.unfollowed[record.name] = "reads the model's input: its mask is held open, all input channels stay"
            elif training and not (layer.mask_frozen or layer.prune_mask.requires_grad or layer.weight.requires_grad):
                # In a network at rest no mask trains; beside ones that do, this one was frozen with its weight.
                if bool(layer.binary_mask().all()):
                    record.open = True
                    self.unfollowed[record.name] = "its weight does not train: its mask is held open"


def _on_cpu(obj: Any) -> Any:
    """The arguments of an operation with their tensors on the CPU."""
    if isinstance(obj, Tensor):
        return obj.cpu()
    if isinstance(obj, (list, tuple)):
        return type(obj)(map(_on_cpu, obj))
    if isinstance(obj, dict):
        return {key: _on_cpu(value) for key, value in obj.items()}
    return slice(*map(_on_cpu, (obj.start, obj.stop, obj.step))) if isinstance(obj, slice) else obj


class _Hooks:
    """Forward hooks of one recording, removed at its end whatever happens."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        rec = self.recorder

        def enter_atom(module: nn.Module, args: Any, kwargs: Any) -> None:
            if rec.depth == 0:
                rec.count_hidden()
            rec.depth += 1

        def leave_atom(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            rec.depth -= 1
            if rec.depth == 0:
                rec._counter.take()  # its kind has the formula
                rec._counter.take_unknown()
                with torch._C.DisableTorchFunction(), rec.unseen():
                    rec.on_atom(module, args, kwargs, output)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if rec.depth == 0:
                rec.count_hidden()
            rec._ran.add(module)
            rec._stack.append(rec.names[module])

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if rec.depth == 0:
                rec.count_hidden()
            rec._stack.pop()
            if rec.depth == 0:
                with torch._C.DisableTorchFunction(), rec.unseen():
                    # The model's own output is somebody's input: all of it is read.
                    if module is rec.model:
                        for t in tensors_in(output):
                            if (ids := rec.ids(t)) is not None:
                                rec.read_all(ids)
                    rec.on_module(module, args, kwargs, output)

        for module in rec.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            atom = (
                kind_of(module) is not None
                or is_channelwise(module)
                or isinstance(module, (_BatchNorm, _InstanceNorm, ChannelPad))
                or type(module) is nn.PReLU
            )
            before, after = (enter_atom, leave_atom) if atom else (enter, leave)
            self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def __exit__(self, *exc: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _is_matrix(t: Tensor) -> bool:
    return sum(s > 1 for s in t.shape) > 1


def _only_dim(ids: Tensor, dim: int) -> bool:
    return all(s == 1 for d, s in enumerate(ids.shape) if d != dim % ids.dim())


def _lift(ids: Tensor, dim: int) -> Tensor:
    return ids.view([1] * (dim - ids.dim()) + list(ids.shape))


def _compress(ids: Tensor) -> Tensor:
    """Drops to size 1 every dimension along which the labels do not change."""
    for d in range(ids.dim()):
        if ids.shape[d] > 1:
            first = ids.narrow(d, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids.contiguous()


def _positional_dim(func: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The ``dim`` argument of a reduction given by position (``x.norm(p, dim)`` takes it third)."""
    position = 2 if getattr(func, "__name__", "") in ("norm",) else 1
    return args[position] if len(args) > position else None
