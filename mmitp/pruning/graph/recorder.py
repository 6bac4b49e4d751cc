"""The recorded pass: a model runs its example, and every layer and torch function leaves its mark on the graph.

Layers and norms are atoms: forward hooks note them whole, whatever happens inside. Torch functions between them go
through the table of :mod:`~mmitp.pruning.graph.ops`. Nothing is taken from names, and what cannot be followed stays
whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from ..layers import ChannelPad, Conv2dKind, is_channelwise, kind_of
from ..masks import MaskedLayer, weights_of
from ..products import Product, ProductCounter, unfused
from ..rng import kept_rng
from ..verify import call_model, copied, eval_mode, tensors_in
from .labels import Labels, is_matrix, only_dim
from .ops import FACTORIES, METADATA, Call, follow
from .records import ChannelGraph, LayerCall, LayerRecord


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
        ValueError: the pass runs no convolution or linear layer, or returns no tensor; the model does not run on such
            an input at all.
    """
    recorder = _Recorder(model)
    try:
        with eval_mode(model), kept_rng(), torch.no_grad(), recorder.hooks(), unfused():
            for example in (example_inputs, *more_examples):
                out = recorder.run(example)
                if next(tensors_in(out), None) is None:
                    kind = type(out).__name__
                    raise ValueError(f"the forward pass of {type(model).__name__} returned no tensor ({kind})")
    except Exception as error:
        recorder.clear()
        _require_runs(model, (example_inputs, *more_examples), error)
        raise
    finally:
        recorder.clear()
    return recorder.finish()


def _require_runs(model: nn.Module, examples: Sequence[Any], seen: Exception) -> None:
    """Tells an input that the model is not made for from a fault of the recorder's.

    Raises:
        ValueError: the model does not run on one of the examples when nobody looks, either.
    """
    with eval_mode(model), kept_rng(), torch.no_grad():
        for example in examples:
            try:
                call_model(model, copied(example))
            except Exception as error:  # whatever a foreign model raises
                shapes = " and ".join(str(tuple(t.shape)) for t in tensors_in(example)) or "this input"
                reason = (str(error).splitlines() or [""])[0]
                raise ValueError(
                    f"{type(model).__name__} does not run on {shapes}: {type(error).__name__}: {reason}"
                ) from seen


class _Recorder(TorchFunctionMode):
    """Labels the tensors of passes and notes their layers.

    Operations are those of the first pass; further ones only add what they need.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {m: name for name, m in model.named_modules()}
        self.labels = Labels(model)
        self.depth = 0  # inside of atoms
        self.layers: dict[Any, LayerRecord] = {}
        self.norms: dict[nn.Module, list[Tensor | None]] = {}
        self.pads: dict[ChannelPad, list[Tensor | None]] = {}
        self._made_of: dict[int, tuple[Tensor, str]] = {}  # views and the like of one weight, with its name
        self._shared = shared_parameters(model)
        self._read_parameters: set[int] = set()  # by functions outside of the layers that own them
        self._ran: set[nn.Module] = set()
        self._counting = True
        self._counter = ProductCounter([])

    def run(self, example: Any) -> Any:
        self.clear()
        example = copied(example)
        self._counter = ProductCounter(tensors_in(example))
        self.labels.start_at(tensors_in(example))
        with self._counter, self:
            out = call_model(self.model, example)
        self.count_hidden()
        self._name_unread_weights()
        self._counting = False
        return out

    def clear(self) -> None:
        """Lets go of the tensors of a pass."""
        self.labels.clear()
        self._made_of.clear()

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """While the recorder computes labels, which is no work of the model's."""
        self._counter.paused = True
        try:
            yield
        finally:
            self._counter.paused = False

    # -- modules

    def hooks(self) -> ExitStack:
        """Forward hooks on all modules, which leave with this context."""

        def enter_atom(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.depth == 0:
                self.count_hidden()
            self.depth += 1

        def leave_atom(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.depth -= 1
            if self.depth == 0:
                self._counter.take()  # its kind has the formula
                self._counter.take_unknown()
                with torch._C.DisableTorchFunction(), self.unseen():
                    self.on_atom(module, args, kwargs, output)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.depth == 0:
                self.count_hidden()
            self._ran.add(module)
            self.labels.stack.append(self.names[module])

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.depth == 0:
                self.count_hidden()
            self.labels.stack.pop()
            if self.depth == 0:
                with torch._C.DisableTorchFunction(), self.unseen():
                    # The model's own output is somebody's input: all of it is read.
                    if module is self.model:
                        for t in tensors_in(output):
                            if (ids := self.labels.ids(t)) is not None:
                                self.labels.read_all(ids)
                    self.on_module(module, args, kwargs, output)

        hooks = ExitStack()
        for module in self.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            atom = (
                kind_of(module) is not None
                or is_channelwise(module)
                or isinstance(module, (_BatchNorm, _InstanceNorm, ChannelPad))
                or type(module) is nn.PReLU
            )
            before, after = (enter_atom, leave_atom) if atom else (enter, leave)
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            # Before the user's hooks: what they make of a layer's output is the network's code, not the layer's.
            hooks.enter_context(module.register_forward_hook(after, with_kwargs=True, prepend=True))
        return hooks

    def on_atom(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors = list(tensors_in((args, kwargs)))
        if not tensors or not isinstance(output, Tensor):
            self.labels.barrier(tensors, tensors_in(output), f"module {self.names[module]!r} returns no plain tensor")
            return
        kind = kind_of(module)
        for other in tensors[1:]:
            if (ids := self.labels.ids(other)) is not None:
                self.labels.read_all(ids)
        if kind is not None:
            self.on_layer(module, kind, tensors[0], output)
        elif is_channelwise(module):
            ids = self.labels.ids(tensors[0])
            if ids is None:
                self.labels.mark_derived(output)
            else:
                self.labels.pass_on(ids, tensors[0], output)
        elif isinstance(module, ChannelPad):
            self.on_channel_pad(module, tensors[0], output)
        else:
            self.on_norm(module, tensors[0], output)
        if kind is None:
            self.labels.mark_image(tensors[:1], [output])

    def on_channel_pad(self, module: ChannelPad, x: Tensor, out: Tensor) -> None:
        """Zero channels are nodes without a source; the others pass through."""
        ids = self.labels.ids(x)
        calls = self.pads.setdefault(module, [])
        if ids is None or not only_dim(ids, 1):
            self.labels.barrier([x], [out], f"{self.names[module]!r} pads a tensor whose channels are not followed")
            self.note_call(calls, None)
            return
        after = module.out_channels - module.front - module.in_channels
        ids = ids.expand(1, module.in_channels, 1, 1)
        ids = torch.cat([self.labels.new_nodes(1, module.front, 1, 1), ids, self.labels.new_nodes(1, after, 1, 1)], 1)
        self.note_call(calls, ids)
        self.labels.label(out, ids)

    def on_norm(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        ids = self.labels.ids(x)
        if ids is not None and not only_dim(ids, 1):
            self.labels.barrier([x], [out], f"{self.names[module]!r} normalises along more than one followed dimension")
            ids = None
        if ids is not None:
            ids = ids.expand([s if d == 1 else 1 for d, s in enumerate(x.shape)])
            if self._shares_parameters(module):
                self.labels.fix(ids)
        self.note_call(self.norms.setdefault(module, []), ids)
        if ids is None:
            self.labels.mark_derived(out)
        else:
            self.labels.label(out, ids)

    def note_call(self, calls: list[Tensor | None], ids: Tensor | None) -> None:
        """A module that runs several times has one width: its channels stay or go together, or all stay."""
        calls.append(ids.reshape(-1) if ids is not None else None)
        if ids is not None and calls[0] is not None:
            self.labels.couple(calls[0], ids)
        if None in calls:
            for known in calls:
                if known is not None:
                    self.labels.fix(known)

    def _shares_parameters(self, module: nn.Module) -> bool:
        return any(id(p) in self._shared for p in module.parameters())

    def on_layer(self, module: nn.Module, kind: Conv2dKind, x: Tensor, out: Tensor) -> None:
        name = self.names[module]
        before = self.labels.n_nodes
        n_in, n_out = kind.channels(module)
        record = self.layers.get(module)
        if record is None:
            record = LayerRecord(name, module, kind, n_in, n_out, kind.groups(module))
            record.out_nodes = self.labels.new_nodes(n_out)
            if record.groups > 1:
                record.group_nodes = self.labels.new_nodes(record.groups)
            self.layers[module] = record
        in_dim = x.dim() - 1 if kind.linear else x.dim() - 3
        ids = self.labels.ids(x)
        if ids is None and not self.labels.is_derived(x):
            self.labels.unfollowed[name] = "its input is of unknown origin, so everything before it stays whole"
            self.labels.read_all(torch.arange(before))
        if ids is not None and not only_dim(ids, in_dim):
            self.labels.read_all(ids)
            self.labels.fix(ids)
            self.labels.unfollowed[name] = "its input mixes followed dimensions"
            ids = None
        record.reads_image |= self.labels.is_image(x)
        ids = ids.expand([n_in if d == in_dim else 1 for d in range(x.dim())]).reshape(-1) if ids is not None else None
        macs = (kind.pair_macs(module, x, out), kind.input_macs(module, x, out)) if self._counting else (0, 0)
        record.calls.append(LayerCall(ids, *macs))
        if ids is not None and record.calls[0].in_ids is not None:
            self.labels.couple(record.calls[0].in_ids, ids)
        if any(call.in_ids is None for call in record.calls):
            for call in record.calls:
                if call.in_ids is not None:
                    self.labels.fix(call.in_ids)
        if self._shares_parameters(module):
            self.hold(record, "another module shares its parameters: counted, stays dense")
        elif kind.whole(module):
            self.hold(record, "its structure forbids removing single channels: counted, stays dense")
        call_out = self.labels.new_nodes(n_out)
        self.labels.need(record.out_nodes, call_out)
        self.labels.couple(record.out_nodes, call_out)
        if record.groups > 1:
            group = record.group_nodes
            self.labels.need(group.repeat_interleave(n_out // record.groups), call_out)
            if ids is not None:
                self.labels.need(ids, group.repeat_interleave(n_in // record.groups))
        out_dim = out.dim() - 1 if kind.linear else out.dim() - 3
        self.labels.label(out, call_out.view([n_out if d == out_dim else 1 for d in range(out.dim())]))

    def hold(self, record: LayerRecord, reason: str) -> None:
        """Keeps all channels of a layer."""
        record.held = True
        self.labels.unfollowed[record.name] = reason
        for nodes in (record.out_nodes, record.group_nodes, *[call.in_ids for call in record.calls]):
            if nodes is not None and len(nodes):
                self.labels.read_all(nodes)

    def on_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module whose output no recorded operation explains read its inputs behind our back."""
        if any(not self.labels.is_derived(t) and id(t) not in self.labels.parameters for t in tensors_in(output)):
            tagged = [t for t in tensors_in((args, kwargs)) if self.labels.ids(t) is not None]
            if tagged:
                self.labels.barrier(
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
        if name == "__get__" or name in METADATA:
            if isinstance(out, Tensor) and inputs:
                if name := self._weight_name(inputs[0]):
                    self._made_of[id(out)] = out, name
                self.on_attribute(getattr(getattr(func, "__self__", None), "__name__", ""), inputs[0], out)
            return
        if name == "__set__":
            self.labels.barrier(inputs, [], "assignment to a tensor attribute")
            return
        outputs = list(tensors_in(out, depth=3))
        if name not in FACTORIES:
            self._read_parameters.update(id(t) for t in inputs if id(t) in self.labels.parameters)
        labelled = [t for t in inputs if self.labels.ids(t) is not None]
        if products:
            self.count(name.strip("_"), inputs, products)
            self.labels.barrier(labelled, outputs, None)
        elif labelled and any(o is i for o in outputs for i in inputs) and self._writes_into_alias(inputs, labelled):
            unlabelled = [t for t in outputs if self.labels.ids(t) is None]
            self.labels.barrier(labelled, unlabelled, f"{name} writes into a shared tensor")
        elif labelled:
            follow(self.labels, Call(name, func, args, kwargs, inputs, out, outputs))
        elif any(self.labels.is_derived(t) for t in inputs):
            self.labels.mark_derived(*outputs)
            self.labels.mark_image(inputs, outputs)
        elif len(names := [name for t in inputs if (name := self._weight_name(t))]) == 1:
            self._made_of.update((id(t), (t, names[0])) for t in outputs)
        self.name_unknown(name.strip("_"))

    def on_attribute(self, name: str, x: Tensor, out: Tensor) -> None:
        ids = self.labels.ids(x)
        if ids is not None and name in ("T", "mT", "H", "mH") and x.dim() == 2:
            self.labels.label(out, ids.t())
        elif ids is not None and name == "mT":
            self.labels.label(out, ids.transpose(-1, -2))
        elif ids is not None and name == "data":
            self.labels.label(out, ids)
        elif ids is not None:
            self.labels.barrier([x], [out], None)
        elif self.labels.is_derived(x):
            self.labels.mark_derived(out)
            self.labels.mark_image([x], [out])

    # -- work that no layer's formula counts

    def count(self, function: str, inputs: Sequence[Tensor], products: Sequence[Product]) -> None:
        """Products with weights outside of the known layers: counted, never pruned."""
        if not self._counting:
            return
        weights = [name for t in inputs if t.dim() > 1 and (name := self._weight_name(t))]
        place = (self.labels.stack and self.labels.stack[-1]) or "model"
        name = f"{weights[0] if len(weights) == 1 else f'{place}.{function}'} ({function})"
        record = self.layers.get(name)
        if record is None:
            first = products[0]
            record = LayerRecord(name, None, None, first.n_in, first.n_out, note="called as a function")
            record.out_nodes = self.labels.new_nodes(record.n_out)
            record.calls.append(LayerCall(None, 0, 0))
            self.layers[name] = record
            self.labels.unfollowed[name] = "called as a function with a weight of its own: counted, stays dense"
        record.own_macs += sum(p.macs for p in products)

    def _weight_name(self, tensor: Tensor) -> str:
        made_of = self._made_of.get(id(tensor))
        return self.labels.parameters.get(id(tensor), made_of[1] if made_of is not None else "")

    def count_hidden(self) -> None:
        """Products since the last recorded function, which nothing but the dispatcher has seen."""
        if products := self._counter.take():
            self.count("hidden", (), products)
        self.name_unknown("")

    def name_unknown(self, function: str) -> None:
        for operator in self._counter.take_unknown():
            self.labels.unfollowed[f"{self.labels.place()} ({function or operator})"] = (
                f"{operator} multiplies by a weight in a way unknown here: not counted"
            )

    def _name_unread_weights(self) -> None:
        """Weights that a module which ran keeps, and no operation of torch's read, may have gone to foreign code."""
        for module in self._ran:
            for name, p in module.named_parameters(recurse=False):
                if is_matrix(p) and not self._counter.was_read(p):
                    self.labels.unfollowed.setdefault(
                        ".".join(filter(None, (self.names[module], name))),
                        "no operation of torch read this weight: if other code multiplies by it, that is not counted",
                    )

    def _writes_into_alias(self, inputs: list[Tensor], labelled: list[Tensor]) -> bool:
        """Whether other tensors take part in an operation in place on a tensor with views, which do not know of it."""
        return any(t is not inputs[0] for t in labelled) and self.labels.has_aliases(inputs[0])

    # -- result

    def finish(self) -> ChannelGraph:
        layers = list(self.layers.values())
        if not layers:
            raise ValueError(f"the forward pass of {type(self.model).__name__} ran no convolution or linear layer")
        for record in layers:
            # Masks are read from outside too, by a MaskBank.
            own = weights_of(record.module) if record.module is not None else ()
            if any(id(p) in self._read_parameters for _, p in own):
                self.hold(record, "its weight is also read elsewhere: counted, stays dense (exclude it from masking)")
        called = {record.module for record in layers}
        self._open_useless_masks()
        for name, module in self.model.named_modules():
            if isinstance(module, MaskedLayer) and module not in called:
                self.labels.unfollowed[name] = "did not run in the recorded pass: not counted, stays dense"
        return ChannelGraph(
            layers,
            self.labels.n_nodes,
            self.labels.tensors(),
            self.labels.edges(),
            self.labels.always(),
            self.labels.fixed(),
            self.labels.coupled(),
            self.norms,
            self.pads,
            self.labels.unfollowed,
        )

    def _open_useless_masks(self) -> None:
        masked = [(r, r.module) for r in self.layers.values() if isinstance(r.module, MaskedLayer)]
        training = any(layer.prune_mask.requires_grad for _, layer in masked)
        for record, layer in masked:
            if record.held:
                record.open = True
            elif record.reads_image and not layer.asked_for:
                record.open = True
                self.labels.unfollowed[record.name] = (
                    "reads the model's input: its mask is held open, all input channels stay"
                )
            elif training and not (layer.mask_frozen or layer.prune_mask.requires_grad or layer.weight.requires_grad):
                # In a network at rest no mask trains; beside ones that do, this one was frozen with its weight.
                if bool(layer.binary_mask().all()):
                    record.open = True
                    self.labels.unfollowed[record.name] = "its weight does not train: its mask is held open"
