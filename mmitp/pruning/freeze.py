"""The end of the pruning window: binary masks fixed at or under the target, whatever happened before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .budget import MacBudget
from .divisor import Divisor
from .layers import masked_layers

#: ``fill`` stops once the ratio is within this fraction below the target.
FILL_TOLERANCE = 0.01


def freeze_masks(model: nn.Module, patterns: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Fixes every mask at its present binary pattern, or at the given one, and returns the model.

    From then on only the weights train: the pattern sits in a persistent buffer, the mask parameter stays in the graph
    with a zero gradient.

    Args:
        model: masked model.
        patterns: layer name -> {0, 1} tensor of the mask's shape, for some or all layers. Layers that share a mask
            share the pattern given for any of them.

    Raises:
        ValueError: the model carries no mask, or ``patterns`` names a layer without one.
    """
    layers = masked_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} carries no mask to freeze")
    patterns = patterns or {}
    if unknown := set(patterns) - set(layers):
        raise ValueError(f"no masked layer(s) named {sorted(unknown)}")
    by_mask = {id(layers[name].prune_mask): pattern for name, pattern in patterns.items()}
    for layer in layers.values():
        pattern = by_mask.get(id(layer.prune_mask))
        layer.freeze_mask(None if pattern is None else pattern.to(layer.prune_mask))
    return model


@dataclass
class Projection:
    """A pattern at or under a target, and what it took to get there.

    Attributes:
        pattern: flat bool vector over all counting masks (see :meth:`MacBudget.split`).
        ratio: operations (or whatever the budget counts) kept under it.
        switched_off: masks switched off because the target was missed.
        switched_on: dropped channels switched on again by ``fill``.
        threshold: the largest mask value switched off (0 if none had to be): how far the masks still had to travel.
    """

    pattern: Tensor
    ratio: float
    switched_off: int = 0
    switched_on: int = 0
    threshold: float = 0.0


def project(budget: MacBudget, target: float, fill: bool = False, divisor: int = 1) -> Projection:
    """The masks' present pattern, cut to the target: the lowest masks go first, each layer keeps its highest.

    Args:
        budget: the model's budget.
        target: ``psi*``, fraction of the dense operations; the result is never above it.
        fill: switch the best dropped channels back on until the ratio is within 1 % of the target, where the cost of a
            single channel (or of ``divisor`` channels) allows.
        divisor: every layer reads and computes a multiple of this many channels, or all it has. Kernels on CPUs and
            GPUs work on 8 or 16 channels at a time, and the others cost what the next multiple costs.

    Raises:
        ValueError: even one input channel (``divisor`` channels) a layer costs more than the target.
    """
    with torch.no_grad():
        masks = budget.flat_masks().detach().cpu()
    on = budget.binarize(masks)
    limit = int(target * budget.dense_cost)
    if divisor != 1:
        return _project_to_multiples(budget, masks, on, target, fill, Divisor(budget, divisor))
    switched_off, threshold = 0, 0.0
    if budget.cost_of(on) > limit:
        order = masks.argsort(stable=True)
        order = order[on[order] & ~_first_maxima(budget, masks)[order]]
        switched_off = _fewest(lambda k: budget.cost_of(_switched(on, order[:k], False)) <= limit, len(order))
        if switched_off > len(order):
            raise ValueError(
                f"target {target} is out of reach: one input channel a layer still costs {budget.min_ratio():.4f} of "
                "the dense operations; raise the target or mask more layers"
            )
        on = _switched(on, order[:switched_off], False)
        threshold = float(masks[order[switched_off - 1]])
    switched_on = 0
    if fill:
        filled = _fill(budget, masks, on, limit)
        switched_on = int(filled.sum() - on.sum())
        on = filled
    return Projection(on, budget.cost_of(on) / budget.dense_cost, switched_off, switched_on, threshold)


def lowest_ratio(budget: MacBudget, divisor: int = 1) -> float:
    """The cheapest ratio a freeze can reach: one input channel a layer, or ``divisor`` of them."""
    if divisor == 1 or not budget.n_literals:
        return budget.min_ratio()
    masks = -torch.arange(1.0, budget.n_literals + 1)
    return budget.cost_of(Divisor(budget, divisor).up(masks, budget.binarize(masks))) / budget.dense_cost


def _project_to_multiples(
    budget: MacBudget, masks: Tensor, before: Tensor, target: float, fill: bool, divisor: Divisor
) -> Projection:
    limit = int(target * budget.dense_cost)
    order = masks.argsort(stable=True)
    order = order[before[order] & ~_first_maxima(budget, masks)[order]]

    def rounded(k: int) -> Tensor:
        return divisor.up(masks, divisor.nearest(masks, _switched(before, order[:k], False)))

    cut = _fewest(lambda k: budget.cost_of(rounded(k)) <= limit, len(order))
    if cut > len(order):
        least = budget.cost_of(rounded(len(order))) / budget.dense_cost
        raise ValueError(
            f"target {target} is out of reach in multiples of {divisor.divisor}: with so many channels a layer "
            f"{least:.4f} of the dense operations remain; raise the target or lower the divisor"
        )
    on = rounded(cut)
    if fill:
        on = _fill_with_multiples(budget, masks, on, limit, divisor)
    off = before & ~on
    threshold = float(masks[off].max()) if bool(off.any()) else 0.0
    ratio = budget.cost_of(on) / budget.dense_cost
    return Projection(on, ratio, int(off.sum()), int((on & ~before).sum()), threshold)


def _fill_with_multiples(budget: MacBudget, masks: Tensor, on: Tensor, limit: int, divisor: Divisor) -> Tensor:
    """Lets one layer after the other grow by a multiple, that with the highest dropped mask first."""
    rows = budget.tables(torch.device("cpu")).literal_row
    full: set[int] = set()
    while budget.cost_of(on) < (1 - FILL_TOLERANCE) * limit:
        order = masks.argsort(descending=True, stable=True)
        best: dict[int, int] = {}
        for index in order[~on[order]].tolist():
            best.setdefault(int(rows[index]), index)
        best = {row: index for row, index in best.items() if row not in full}
        if not best:
            break
        for row, index in best.items():
            more = divisor.up(masks, _switched(on, torch.tensor([index]), True))
            if budget.cost_of(more) <= limit:
                on = more
                break
            full.add(row)
    return on


def _fill(budget: MacBudget, masks: Tensor, on: Tensor, limit: int) -> Tensor:
    order = masks.argsort(descending=True, stable=True)
    order = order[~on[order]]
    fit = _fewest(lambda k: budget.cost_of(_switched(on, order[:k], True)) > limit, len(order)) - 1
    on = _switched(on, order[:fit], True)
    for index in order[fit:].tolist():
        if budget.cost_of(on) >= (1 - FILL_TOLERANCE) * limit:
            break
        candidate = on.clone()
        candidate[index] = True
        if budget.cost_of(candidate) <= limit:
            on = candidate
    return on


def _first_maxima(budget: MacBudget, masks: Tensor) -> Tensor:
    """The entries no layer may lose: with every mask negative, the guard alone is on."""
    return budget.binarize(masks - masks.max() - 1)


def _switched(on: Tensor, indices: Tensor, value: bool) -> Tensor:
    out = on.clone()
    out[indices] = value
    return out


def _fewest(holds: Callable[[int], bool], n: int) -> int:
    """The smallest k in 0..n for which the monotone predicate holds, n + 1 if it never does."""
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
