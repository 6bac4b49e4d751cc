"""Physical removal of what the masks leave unread: a plain, smaller network that computes the same.

Two questions are kept apart. *Which channels are computed* follows the needs alone, so the MACs equal the budget's as
an integer. *Which channels a tensor keeps* follows from the unchanged code of the model: channels that an addition or
a shared module couples (a dependency group) are kept while any of them is needed, and tensors whose code has channel
numbers in it keep their width. A layer that reads less than its input holds gathers; one that computes less than its
output holds scatters into zeros that nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmitp.values import is_count

from .budget import MacBudget
from .layers import ChannelPad, Conv2dKind, bare_type, kind_of, masked_layers, slim_type
from .masks import NOT_FINITE, remove_banks
from .needs import channel_masked
from .reparam import guard_reparameterization
from .slim_layers import SlimLayer
from .verify import copy_of, difference, difference_in_double

logger = logging.getLogger(__name__)


@dataclass
class LayerPlan:
    """What stays of one layer, and where it sits in the tensors beside it.

    Attributes:
        in_keep, out_keep: channels of the dense layer that stay, ``(inputs,)`` and ``(outputs,)`` int64.
        in_index: positions of ``in_keep`` in the input tensor, ``(inputs,)`` int64; None: they are all of it.
        out_index: positions of ``out_keep`` in the output tensor, ``(outputs,)`` int64; None: they are all of it.
        out_width: channels of the output tensor.
    """

    in_keep: Tensor
    out_keep: Tensor
    in_index: Tensor | None
    out_index: Tensor | None
    out_width: int


@dataclass
class SlimPlan:
    """What stays of every layer and per-channel module, by module name.

    Attributes:
        layers: what stays of each layer.
        norms: kept channels of each norm, ``(kept,)`` int64.
        pads: of each :class:`ChannelPad` how many zero channels stay in front, how many are passed on, and how many
            zeros follow.
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

    def within(self, present: SlimPlan) -> SlimPlan:
        """The plan for a model that has been cut to ``present`` before: its channels numbered as they stand there now.

        Args:
            present: the cut's plan; like this one of the dense network's channels, and of no fewer of them.
        """
        layers = {
            name: replace(
                p,
                in_keep=_places(p.in_keep, present.layers[name].in_keep),
                out_keep=_places(p.out_keep, present.layers[name].out_keep),
            )
            for name, p in self.layers.items()
        }
        norms = {name: _places(keep, present.norms[name]) for name, keep in self.norms.items()}
        return SlimPlan(layers, norms, dict(self.pads))

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> SlimPlan:
        """The plan that gives a dense model the structure of a spec; which channels is left to the state dict.

        Raises:
            ValueError: it lacks a part, or a part is not what :meth:`spec` writes; the message names it.
        """
        _check_spec(spec)
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


def _check_spec(spec: Any) -> None:
    """Refuses what :meth:`SlimPlan.spec` does not write (a config is edited by hand)."""

    def require(holds: bool, where: str, what: str, found: Any) -> None:
        if not holds:
            raise ValueError(f"the slim spec's {where} must be {what}, got {found!r}: take it as 'mmitp slim' wrote it")

    if not isinstance(spec, Mapping):
        raise ValueError(f"a slim spec is a dictionary, got {spec!r}: take it as 'mmitp slim' wrote it")
    for part in ("layers", "norms", "pads"):
        found = spec.get(part, {} if part == "pads" else None)
        require(isinstance(found, Mapping), part, "a dictionary by layer name", found)
    for name, entry in spec["layers"].items():
        require(isinstance(entry, Mapping), f"layers[{name!r}]", "a dictionary of inputs and outputs", entry)
        for key in ("inputs", "outputs", *({"scatter"} & {*entry})):
            require(is_count(entry.get(key), 0), f"layers[{name!r}].{key}", "a number of channels", entry.get(key))
    for name, n in spec["norms"].items():
        require(is_count(n, 0), f"norms[{name!r}]", "a number of channels", n)
    for name, pad in spec.get("pads", {}).items():
        whole = isinstance(pad, Sequence) and len(pad) == 3 and all(is_count(n, 0) for n in pad)
        require(whole, f"pads[{name!r}]", "three numbers of channels: in front, passed on, behind", pad)


def _places(keep: Tensor, present: Tensor) -> Tensor:
    """Where each channel of ``keep`` stands among those present; both rise."""
    places = torch.searchsorted(present, keep)
    assert torch.equal(present[places], keep), "a channel that was cut cannot be kept"
    return places


def plan_slim(
    model: nn.Module, budget: MacBudget, whole_tensors: bool = False, pattern: Tensor | None = None
) -> SlimPlan:
    """Decides what stays under the masks' present patterns.

    Args:
        model: the model ``budget`` was recorded on.
        budget: its budget.
        whole_tensors: let every tensor keep its present width (gathers and scatters everywhere). MACs are the same;
            this is the way for models whose code does not bear narrower tensors.
        pattern: flat bool pattern in place of the masks'.

    Raises:
        ValueError: the budget was recorded on another model, be it a copy of this one.
    """
    if pattern is None:
        budget.require_tied()
        pattern = budget.flat_pattern()
    needed = budget.node_needs(pattern)
    plan = plan_of_dense(model, budget, pattern, budget.present if whole_tensors else budget.kept(needed))
    return plan if budget.cut is None else plan.within(budget.cut)


def plan_of_dense(model: nn.Module, budget: MacBudget, pattern: Tensor, kept: Tensor) -> SlimPlan:
    """:func:`plan_slim` in the dense network's channels, also where the model has been cut since.

    Args:
        model: the model ``budget`` was recorded on.
        budget: its budget.
        pattern: flat bool.
        kept: ``(n_nodes,)`` bool, the channels that tensors keep.
    """
    graph, on, computed = budget.graph, budget.in_dense(pattern), budget.node_needs(pattern)

    names = {m: name for name, m in model.named_modules()}
    if stranger := next((r.name for r in graph.layers if r.module is not None and r.module not in names), None):
        raise ValueError(
            f"the budget was recorded on another model: its layer {stranger!r} is not in this {type(model).__name__} "
            "(a copy is another model too). Make a MacBudget of the model that is to be slimmed"
        )
    plan = SlimPlan()
    for record, entries in zip(graph.layers, budget.needs.layer_entries, strict=True):
        if record.module is None:
            continue
        if record.groups > 1:
            live = computed[record.group_nodes]
            in_on = live.repeat_interleave(record.n_in // record.groups)
            out_on = live.repeat_interleave(record.n_out // record.groups)
        else:
            in_on = torch.ones(record.n_in, dtype=torch.bool)
            if entries is not None and channel_masked(record):
                in_on = on[entries]
            out_on = computed[record.out_nodes]
        ids = record.calls[0].in_ids
        in_here = kept[ids] if ids is not None else torch.ones(record.n_in, dtype=torch.bool)
        out_here = kept[record.out_nodes]
        assert not bool((in_on & ~in_here).any()), f"{record.name} reads channels that are gone"
        in_index = None if torch.equal(in_on, in_here) else _positions(in_on, in_here)
        out_index = None if torch.equal(out_on, out_here) else _positions(out_on, out_here)
        plan.layers[names[record.module]] = LayerPlan(
            in_on.nonzero().flatten(), out_on.nonzero().flatten(), in_index, out_index, int(out_here.sum())
        )
    for module, calls in graph.norms.items():
        if calls[0] is not None:
            keep = kept[calls[0]]
            plan.norms[names[module]] = keep.nonzero().flatten()
    for pad, calls in graph.pads.items():
        if calls[0] is not None:
            first, last = budget.dense_pads[pad]
            front, passed, after = (int(here.sum()) for here in kept[calls[0]].tensor_split((first, last)))
            plan.pads[names[pad]] = front, passed, after
    return plan


def apply_plan(model: nn.Module, plan: SlimPlan, keep_masks: bool = False) -> nn.Module:
    """Shrinks a model in place by a plan.

    Args:
        model: the model; a masked one may have been cut before.
        plan: what stays of it. Masks, where present, are dropped: the plan already holds their pattern.
        keep_masks: masks stay and are cut with their inputs; they train on.

    Raises:
        ValueError: the plan names a module the model lacks, or one of another type or size.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in [*plan.layers, *plan.norms, *plan.pads]:
        if name not in modules:
            raise ValueError(f"the slim spec names a module {name!r} that {type(model).__name__} does not have")
    for name in plan.layers:
        if isinstance(layer := modules[name], SlimLayer):
            layer.unwire(bare_type(layer))
    if keep_masks:
        _cut_masks(model, plan)
    else:
        remove_banks(model)
        _drop_masks(model, plan)
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
        norm = modules[name]
        size = getattr(norm, _norm_size(norm), None)
        if not isinstance(size, int) or not _is_scalar(norm) and len(keep) > size:
            raise ValueError(
                f"the slim spec gives {name!r} {len(keep)} channels, which is {norm} here: it was made from another "
                "model"
            )
        _shrink_norm(norm, keep)
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


def _drop_masks(model: nn.Module, plan: SlimPlan) -> None:
    for name, layer in masked_layers(model).items():
        cut = plan.layers.get(name)
        if layer.mask_granularity == "channel" and cut is not None and len(cut.in_keep) < layer.prune_mask.numel():
            layer.detach_mask()
        else:
            # Nothing of its inputs is removed (its mask does not count, or the recorded pass never ran it).
            layer.fold()


def _cut_masks(model: nn.Module, plan: SlimPlan) -> None:
    done: set[int] = set()  # layers may share a mask
    for name, layer in masked_layers(model).items():
        cut = plan.layers.get(name)
        if layer.mask_granularity != "channel" or cut is None:
            continue
        keep = cut.in_keep.to(layer.prune_mask.device)
        layer.prune_pattern = layer.prune_pattern[keep]
        if layer.mask_ties is not None:
            assert layer.mask_parts is not None
            layer.tie_mask(layer.mask_ties[cut.in_keep], layer.mask_parts[cut.in_keep])
        if id(layer.prune_mask) not in done:
            done.add(id(layer.prune_mask))
            layer.prune_mask.data = layer.prune_mask.data[keep]


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

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import mask_model, slim
        >>> net, x = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))), torch.randn(1, 3, 5, 5)
        >>> net[1].prune_mask.data[:3] = -1
        >>> small = slim(net, x)
        >>> small
        Sequential(
          (0): Conv2d(3, 5, kernel_size=(1, 1), stride=(1, 1))
          (1): Conv2d(5, 4, kernel_size=(1, 1), stride=(1, 1))
        )
        >>> torch.allclose(small(x), net(x), atol=1e-6)
        True
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
    small, plan, _ = checked(model, budget, (example_inputs, *more_examples))
    return small, plan


def checked(
    model: nn.Module, budget: MacBudget, examples: Sequence[Any], pattern: Tensor | None = None
) -> tuple[nn.Module, SlimPlan, bool]:
    """A slimmed copy that computes the same on every example, its plan, and whether its tensors keep their widths.

    Args:
        model: masked model.
        budget: its budget.
        examples: inputs of forward passes.
        pattern: flat bool, the mask entries that stay, of which the copy keeps the masks; None: those that are on,
            and the copy has no masks.

    Raises:
        RuntimeError: it does not compute the same with whole tensors either.
    """
    problem = ""
    # A network that did not bear narrower tensors when it was cut need not try them again.
    for whole_tensors in (True,) if budget.whole_tensors else (False, True):
        plan = plan_slim(model, budget, whole_tensors, pattern)
        small = apply_plan(copy_of(model), plan, keep_masks=pattern is not None)
        problems = [_real_difference(model, small, example) for example in examples]
        if not any(problems):
            return small, plan, whole_tensors
        problem = next(filter(None, problems))
        if not whole_tensors:
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
    layer.__class__ = slim_type(layer)
    assert isinstance(layer, SlimLayer)
    layer.wire(
        entry.in_index.to(device) if entry.in_index is not None else None,
        entry.out_index.to(device) if entry.out_index is not None else None,
        entry.out_width,
    )


def _norm_size(norm: nn.Module) -> str:
    """The name of a norm's number of channels."""
    return "num_parameters" if isinstance(norm, nn.PReLU) else "num_features"


def _is_scalar(norm: nn.Module) -> bool:
    """Whether all channels share one parameter."""
    return isinstance(norm, nn.PReLU) and norm.num_parameters == 1


def _shrink_norm(norm: Any, keep: Tensor) -> None:
    if _is_scalar(norm):
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(norm, name, None)
        if isinstance(value, Tensor):
            value.data = value.data.index_select(0, keep.to(value.device))
    setattr(norm, _norm_size(norm), len(keep))
