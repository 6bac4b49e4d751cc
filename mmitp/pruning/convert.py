"""Conversion of a built model: masks on its convolutions (S2), and back by folding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .graph import LayerRecord, record_graph, shared_parameters
from .layers import kind_of, masked_layers, require_plain
from .masks import GRANULARITIES, MaskedLayer
from .needs import components
from .reparam import guard_reparameterization


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module name matches a glob (``'*.conv1'``) or lies in a named subtree (``'backbone'``)."""
    return any(fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns)


def mask_model(
    model: nn.Module,
    granularity: str = "channel",
    init: float = 1.0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    linear: bool = False,
    example_inputs: Any = None,
) -> nn.Module:
    """Gives every matching layer a trainable mask, in place, and returns the same model object.

    Converted by exact type: ``nn.Conv2d``, ``nn.ConvTranspose2d``, what :func:`~mmitp.pruning.register_kind` added
    (the modulated deformable convolution, its offset convolution under the same mask), and ``nn.Linear`` with
    ``linear=True`` or where ``include`` names it exactly. Grouped and depthwise convolutions carry no mask of their
    own, nor do layers whose parameters another module shares; neither do layers with a frozen weight, nor the stem,
    unless ``include`` names them exactly. A layer changes its class only: parameters, hooks, keys and the places that
    share it stay.

    With an example a forward pass decides: stems are all layers that read the model's input with no other layer before
    them, and layers that never run as modules, or whose weight is read by other code, get no mask. Without one the stem
    is the first convolution in registration order, if it reads up to three channels; a mask that a later
    :class:`~mmitp.pruning.MacBudget` finds useless is held open, but distributed training stops at one that gets no
    gradient. Give an example wherever there is one.

    Args:
        model: any module; not yet wrapped for distributed training, not yet given to an optimizer.
        granularity: ``'channel'`` (one value an input channel) or ``'weight'`` (one a weight, irregular pruning).
        init: initial mask value (S1: 1.0; 0.3 in its Fig. 1).
        include: module-name patterns (globs, or names of subtrees); by default all.
        exclude: patterns left dense even where ``include`` matches.
        linear: whether linear layers get masks on their input features too.
        example_inputs: as for :class:`~mmitp.pruning.MacBudget`; None to go by registration order.

    Raises:
        ValueError: no layer matches, the granularity is unknown, a pattern matches no module at all, ``include`` names
            a layer that the example shows cannot carry a mask, a lazy layer has no weights yet, or the model already
            carries masks.

    Example:
        >>> from torch import nn
        >>> from mmitp.pruning import mask_model
        >>> mask_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): MaskedConv2d(8, 4, kernel_size=(3, 3), stride=(1, 1), mask=channel (trainable))
        )
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}")
    included = [include] if isinstance(include, str) else None if include is None else list(include)
    excluded = [exclude] if isinstance(exclude, str) else list(exclude or ())
    if masked_layers(model):
        raise ValueError(f"the model already carries masks (on {next(iter(masked_layers(model)))!r} and others)")
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(f"the lazy layer {name!r} has no weights yet: run the model once, and mask it then")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in (included or []) + excluded:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"include/exclude pattern {pattern!r} matches no module of {type(model).__name__}")

    records: dict[nn.Module, LayerRecord] | None = None
    if example_inputs is not None:
        records = {r.module: r for r in record_graph(model, example_inputs).layers if r.module is not None}
    chosen: list[tuple[nn.Module, bool]] = []
    for name, module in _candidates(model):
        kind = kind_of(module)
        assert kind is not None
        named = included is not None and name in included
        if included is not None and not matches(name, included) or matches(name, excluded):
            continue
        if not kind.can_mask(module) or kind.linear and not (linear or named):
            continue
        if not module.weight.requires_grad and not named:
            continue
        stem = _is_stem(model, module) if records is None else module in records and records[module].reads_image
        if stem and not named:
            continue
        if records is not None and (module not in records or records[module].held):
            if named:
                why = (
                    "its weight is read by other code" if module in records else "it does not run in the example's pass"
                )
                raise ValueError(f"include names {name!r}, which cannot carry a mask: {why}")
            continue
        chosen.append((module, named))
    if not chosen:
        raise ValueError(
            f"no layer of {type(model).__name__} to mask with include={included}, exclude={excluded}: masks go on "
            "plain (not grouped) nn.Conv2d, nn.ConvTranspose2d and registered deformable convolutions by exact type, "
            "the stem excepted, and on nn.Linear with linear=True"
        )
    for module, named in chosen:
        _attach(module, granularity, init, named)
    guard_reparameterization(model)
    return model


def share_masks(model: nn.Module, example_inputs: Any) -> list[list[str]]:
    """Gives all masked layers that read one stream of channels one mask, in place, and returns their names by stream.

    With masks of their own, a tensor with many readers (a residual stream) keeps what any of them keeps, nearly
    everything, and each reader gathers its part of it. With one mask the stream itself gets narrower and there is
    nothing to gather. A stream is all tensors whose channels are coupled (a dependency group): a residual sum, its
    terms and what pooling and normalisation make of it.

    The layers share one ``prune_mask`` Parameter from then on: optimizers, averaged copies, distributed training,
    budget and freeze see one mask. mmengine's optimizer constructor needs ``bypass_duplicate=True`` in its
    ``paramwise_cfg``, if there is one. Masks on single weights stay as they are.

    Layers that read some channels in common, or the same in another order (a concatenation of streams, a stream that
    goes on behind zero channels, a shuffle), have masks that are *tied*: each has its own Parameter, and what stands
    for one channel in several of them is one entry of the budget. Tied entries start equal, and
    :class:`~mmitp.pruning.InTrainPruner` keeps them so (a loop of your own calls
    :meth:`MacBudget.tie_gradients <mmitp.pruning.MacBudget.tie_gradients>`). A channel dropped goes everywhere. Entries
    of one mask that stand for one channel are tied likewise: a layer may read a stream's tensors from before and after
    a block.

    Args:
        model: masked model, not yet wrapped for distributed training, not yet given to an optimizer.
        example_inputs: as for :class:`~mmitp.pruning.MacBudget`.

    Raises:
        ValueError: the model carries no mask, or some are frozen.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import mask_model, share_masks
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        ...     def forward(self, x):
        ...         x = self.stem(x)
        ...         return self.b(x + self.a(x))
        >>> net = mask_model(Residual())
        >>> share_masks(net, torch.randn(1, 3, 4, 4))
        [['a', 'b']]
        >>> net.a.prune_mask is net.b.prune_mask
        True
    """
    layers = masked_layers(model)
    if not layers or any(layer.mask_frozen for layer in layers.values()):
        raise ValueError(f"{type(model).__name__} carries no masks, or frozen ones: share them before the training")
    graph = record_graph(model, example_inputs)
    stream = components(graph.n_nodes, graph.coupled)
    groups: dict[tuple[int, ...], list[tuple[str, MaskedLayer]]] = {}
    for record in graph.layers:
        ids = record.calls[0].in_ids
        if record.mask is not None and record.mask.mask_granularity == "channel" and ids is not None:
            groups.setdefault(tuple(stream[ids].tolist()), []).append((record.name, record.mask))
    for (_, first), *others in groups.values():
        for _, layer in others:
            layer.prune_mask = first.prune_mask
    families = _tie_overlapping(groups)
    return [[name for group in family for name, _ in groups[group]] for family in families]


_Group = tuple[int, ...]


def _tie_overlapping(groups: dict[_Group, list[tuple[str, MaskedLayer]]]) -> list[list[_Group]]:
    """Ties the masks of layers that have some of their input channels in common, and those that have one twice; the
    groups that belong together then, those of more than one layer.

    Args:
        groups: streams' channels that a layer reads, in its order -> the layers that read these.
    """
    families: list[list[_Group]] = []
    for group in groups:
        met = [f for f in families if any(not set(group).isdisjoint(other) for other in f)]
        families = [f for f in families if f not in met]
        families.append([*(other for f in met for other in f), group])
    for members in families:
        if len(members) == 1 and len(set(members[0])) == len(members[0]):
            continue
        readers: dict[int, set[_Group]] = {}  # of every channel
        for group in members:
            for channel in group:
                readers.setdefault(channel, set()).add(group)
        for group in members:
            parts: dict[frozenset[_Group], int] = {}
            numbers = [parts.setdefault(frozenset(readers[channel]), len(parts)) for channel in group]
            for _, layer in groups[group]:
                layer.tie_mask(torch.tensor(group), torch.tensor(numbers))
    return [members for members in families if sum(len(groups[group]) for group in members) > 1]


def fold_masks(model: nn.Module) -> nn.Module:
    """Multiplies each weight by its binary mask and turns the layers dense again, in place; returns the model.

    Shapes stay: the zeros remain in the weights. Its state dict loads into the dense model, and what reads
    ``conv.weight`` directly (BatchNorm fusion, re-parameterisation, exporters) sees the pruned weights: fold before
    you hand a masked network to other tools. :func:`~mmitp.pruning.fold_norms` is the way to fold BatchNorms, of
    slimmed networks too.

    Raises:
        ValueError: a layer was parametrized after it got its mask; none is folded then.

    Example:
        >>> from torch import nn
        >>> from mmitp.pruning import fold_masks, mask_model
        >>> net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)))
        >>> net[1].prune_mask.data[:3] = -1
        >>> fold_masks(net)[1]
        Conv2d(8, 4, kernel_size=(1, 1), stride=(1, 1))
        >>> (net[1].weight == 0).all((0, 2, 3)).tolist()
        [True, True, True, False, False, False, False, False]
    """
    require_plain(model)
    for layer in masked_layers(model).values():
        layer.fold()
    return model


def _attach(module: nn.Module, granularity: str, init: float, asked_for: bool) -> None:
    kind = kind_of(module)
    assert kind is not None
    dense = type(module)
    module.__class__ = kind.masked
    assert isinstance(module, MaskedLayer)
    module.dense_type = dense
    module.asked_for = asked_for
    module.attach_mask(granularity, init)


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers of a known kind without tied weights, outermost ones (no offset convolution inside a deformable one)."""
    out: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(p + ".") for p in inside):
            continue
        if kind_of(module) is not None:
            out.append((name, module))
            inside.append(name)
    shared = shared_parameters(model)
    return [(name, m) for name, m in out if not any(id(p) in shared for p in m.parameters())]


def _is_stem(model: nn.Module, module: nn.Module) -> bool:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return module is first and isinstance(module.weight, Tensor) and module.weight.shape[1] <= 3
