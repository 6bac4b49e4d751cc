"""The end of the pruning window: binary masks fixed at or under the target, whatever happened before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmitp.values import is_number

from .budget import MacBudget
from .divisor import Divisor, check_divisor
from .layers import masked_layers
from .masks import NOT_FINITE, ranks
from .needs import channel_masked

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
        ValueError: the model carries no mask, ``patterns`` names a layer without one, or a pattern is empty, not
            binary, not finite or of another shape (no mask is frozen then).

    Example:
        >>> from torch import nn
        >>> from mmitp.pruning import freeze_masks, mask_model
        >>> net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)))
        >>> net[1].prune_mask.data[:2] = -0.1
        >>> freeze_masks(net)[1]
        MaskedConv2d(4, 2, kernel_size=(1, 1), stride=(1, 1), mask=channel (frozen))
        >>> net[1].prune_pattern
        tensor([0., 0., 1., 1.])
    """
    layers = masked_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} carries no mask to freeze")
    patterns = patterns or {}
    if unknown := set(patterns) - set(layers):
        raise ValueError(f"no masked layer(s) named {sorted(unknown)}")
    by_mask = {id(layers[name].prune_mask): pattern for name, pattern in patterns.items()}
    fixed = {}
    for name, layer in layers.items():
        pattern = by_mask.get(id(layer.prune_mask))
        if pattern is None and not bool(torch.isfinite(layer.prune_mask).all()):
            raise ValueError(f"layer {name!r} cannot be frozen: {NOT_FINITE}")
        fixed[name] = layer.binary_mask() if pattern is None else pattern.to(layer.prune_mask)
        if problem := layer.pattern_problem(fixed[name]):
            raise ValueError(f"layer {name!r} cannot be frozen: {problem}")
    for name, layer in layers.items():
        layer.freeze_mask(fixed[name])
    return model


@dataclass
class Projection:
    """A pattern at or under a target, and what it took to get there.

    Attributes:
        pattern: ``(N,)`` bool, flat over all counting masks (see :meth:`MacBudget.split`).
        ratio: operations (or whatever the budget counts) kept under it.
        switched_off: masks switched off because the target was missed.
        switched_on: dropped channels switched on again by ``fill``.
        threshold: the largest mask value switched off (0 if none had to be): how far the masks still had to travel.
    """

    pattern: Tensor
    ratio: float
    switched_off: int
    switched_on: int
    threshold: float


def cost_limit(budget: MacBudget, target: float) -> int:
    """The most that a network within the target may cost: the largest whole number whose ratio is not above it."""
    limit = int(target * budget.dense_cost)
    return limit + ((limit + 1) / budget.dense_cost <= target)


def project(
    budget: MacBudget,
    target: float,
    fill: bool = False,
    divisor: int | str = 1,
    min_keep: float = 0.0,
    masks: Tensor | None = None,
) -> Projection:
    """The masks' present pattern, cut to the target: the lowest masks go first, each layer keeps its highest.

    Where many layers read one tensor, every layer's own best channels may cost more than the target while the same
    channels for all do not. Then, and only then, layers take the same ones, one layer after the other.

    Args:
        budget: the model's budget.
        target: ``psi*``, fraction of the dense operations; the result is never above it.
        fill: switch the best dropped channels back on until the ratio is within 1 % of the target, where the cost of a
            single channel (or of ``divisor`` channels) allows.
        divisor: every layer reads and computes a multiple of this many channels, or all it has. Kernels on CPUs and
            GPUs work on 8 or 16 channels at a time, and the others cost what the next multiple costs. ``'auto'``: less
            in narrow layers, see :func:`~mmitp.pruning.divisor.divisor_of`.
        min_keep: part of its input channels that every layer keeps at least, see :func:`floors`.
        masks: flat vector in place of the model's masks, on the CPU.

    Raises:
        ValueError: the target is not in (0, 1]; even the cheapest pattern (:func:`lowest_ratio`) costs more; a mask is
            not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import MacBudget, freeze_masks, mask_model, project
        >>> net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)))
        >>> net[1].prune_mask.data = torch.tensor([0.2, 0.9, 0.1, 0.8])
        >>> budget = MacBudget(net, torch.randn(1, 3, 5, 5))
        >>> found = project(budget, 0.5)
        >>> found.pattern, found.ratio
        (tensor([False,  True, False,  True]), 0.5)
        >>> _ = freeze_masks(net, budget.split(found.pattern))
    """
    if not (is_number(target) and 0 < target <= 1):
        raise ValueError(f"target must be a fraction of the dense {budget.what} in (0, 1], got {target!r}")
    if masks is None:
        masks = budget.flat_masks().detach().cpu()
    require_finite(budget, masks)
    grid = _Grid.of(budget, masks, divisor, min_keep)
    limit = cost_limit(budget, target)
    before = budget.binarize(masks)
    kept = before | grid.least
    order = masks.argsort(stable=True)
    order = order[(kept & ~grid.least)[order]]
    cut = _fewest(lambda k: budget.cost_of(grid.allowed(_switched(kept, order[:k], False))) <= limit, len(order))
    on = grid.aligned(limit) if cut > len(order) else grid.allowed(_switched(kept, order[:cut], False))
    if budget.cost_of(on) > limit:
        raise ValueError(
            f"target {target} is out of reach: with {_of_each(divisor, min_keep)} a layer "
            f"{lowest_ratio(budget, divisor, min_keep):.4f} of the dense {budget.what} remain; raise the target, mask "
            "more layers, or lower divisor or min_keep"
        )
    if fill:
        on = grid.filled(on, limit)
    off = before & ~on
    threshold = float(masks[off].max()) if bool(off.any()) else 0.0
    ratio = budget.cost_of(on) / budget.dense_cost
    return Projection(on, ratio, int(off.sum()), int((on & ~before).sum()), threshold)


def _of_each(divisor: int | str, min_keep: float) -> str:
    channels = "1 to 8 input channels (divisor='auto')" if divisor == "auto" else f"{divisor} input channel(s)"
    return channels + (f" and {min_keep:g} of all it has" if min_keep else "")


def lowest_ratio(budget: MacBudget, divisor: int | str = 1, min_keep: float = 0.0) -> float:
    """The cheapest ratio that :func:`project` reaches in any case: every layer keeps its first channels.

    Args:
        budget: the model's budget.
        divisor: as in :func:`project`.
        min_keep: as in :func:`project`.
    """
    if not budget.n_entries:
        return 1.0
    pattern = lowest_pattern(budget, _falling(budget.n_entries), divisor, min_keep)
    return budget.cost_of(pattern) / budget.dense_cost


def lowest_pattern(budget: MacBudget, masks: Tensor, divisor: int | str, min_keep: float) -> Tensor:
    """The flat bool pattern in which every layer keeps its highest masks, as few of them as it may.

    Args:
        budget: the model's budget.
        masks: flat vector of all counting masks, on the CPU.
        divisor: as in :func:`project`.
        min_keep: as in :func:`project`.
    """
    return _Grid.of(budget, masks, divisor, min_keep).lowest()


def require_reachable(budget: MacBudget, target: float, divisor: int | str = 1, min_keep: float = 0.0) -> None:
    """Refuses at the start what the freeze could not meet.

    Raises:
        ValueError: the target is below :func:`lowest_ratio`.
    """
    low = lowest_ratio(budget, divisor, min_keep)
    if round(low * budget.dense_cost) > cost_limit(budget, target):
        raise ValueError(
            f"target {target} cannot be reached: with {_of_each(divisor, min_keep)} a layer {low:.4f} of the "
            f"{budget.what} remain. Raise the target, let more layers carry masks (mask_model's include and exclude, "
            "model.prune in a config), or lower divisor or min_keep"
        )


def require_finite(budget: MacBudget, masks: Tensor) -> None:
    """Refuses masks that hold NaN or infinity.

    Args:
        budget: the model's budget.
        masks: flat vector of all counting masks.

    Raises:
        NotFinite: names the first such layer.
    """
    wrong = ~torch.isfinite(masks)
    if bool(wrong.any()):
        raise not_finite(budget, wrong)


class NotFinite(ValueError):
    """A mask holds NaN or infinity; ``ago`` optimizer steps ago it was found so."""

    ago = 0


def not_finite(budget: MacBudget, wrong: Tensor, ago: int = 0) -> NotFinite:
    """The error that names the first layer of which masks are ``wrong`` (flat bool)."""
    names = [name for name, part in budget.split(wrong.cpu()).items() if bool(part.any())]
    when = f", {ago} optimizer step(s) ago" if ago else ""
    error = NotFinite(f"layer {names[0]!r} ({len(names)} in all){when}: {NOT_FINITE}")
    error.ago = ago
    return error


def floors(budget: MacBudget, min_keep: float) -> Tensor:
    """How many entries every layer keeps at least: ``(layers,)`` long, 0 for layers without a mask.

    One, and of channel masks the part ``min_keep`` (rounded up). Masks on single weights do not narrow a layer.

    Raises:
        ValueError: ``min_keep`` outside [0, 1).
    """
    if not 0 <= min_keep < 1:
        raise ValueError(f"min_keep must be a part of a layer's channels in [0, 1), got {min_keep}")
    size = budget.tables(torch.device("cpu")).entry_count  # of the dense network, whatever has been cut off since
    narrows = torch.tensor([channel_masked(record) for record in budget.layers])
    part = torch.where(narrows, torch.ceil(size.double() * min_keep - 1e-9).long(), 0)
    return torch.maximum(part, (size > 0).long())


def highest(budget: MacBudget, masks: Tensor, count: Tensor) -> Tensor:
    """The ``count[row]`` highest entries of every layer's mask, the first of equal ones, as flat bool vector; of a tied
    mask one of each part at least."""
    rows = budget.tables(masks.device).entry_row
    stays = ranks(masks, rows, len(count)) < count.to(masks.device)[rows]
    return stays if budget.copies(masks.device) is None else stays | budget.last_of_parts(masks)


def _falling(n: int) -> Tensor:
    """Negative masks that fall with the index: whoever keeps his best keeps his first."""
    return -torch.arange(1.0, n + 1)


class _Grid:
    """The patterns that a freeze may end at: every layer keeps its floor, in multiples of a divisor.

    Attributes:
        least: the entries that stay in any case, flat bool.
    """

    def __init__(self, budget: MacBudget, masks: Tensor, divisor: Divisor | None, floor: Tensor) -> None:
        self.budget, self.masks, self.divisor, self.floor = budget, masks, divisor, floor
        self.least = highest(budget, masks, floor)

    @classmethod
    def of(cls, budget: MacBudget, masks: Tensor, divisor: int | str, min_keep: float) -> _Grid:
        """From the arguments of :func:`project`."""
        check_divisor(divisor)
        return cls(budget, masks, None if divisor == 1 else Divisor(budget, divisor), floors(budget, min_keep))

    def allowed(self, on: Tensor) -> Tensor:
        """A pattern in multiples of the divisor."""
        if self.divisor is None:
            return on
        return self.divisor.up(self.masks, self.divisor.nearest(self.masks, on))

    def lowest(self) -> Tensor:
        """The cheapest pattern: what stays in any case, and nothing else."""
        return self.allowed(self.least)

    def aligned(self, limit: int) -> Tensor:
        """Layers keep their first channels in place of their best ones, as few layers as it takes to meet the limit."""
        on, falling = self.lowest(), _falling(len(self.masks))
        rows = self.budget.tables(torch.device("cpu")).entry_row
        for row in rows.unique().tolist():
            if self.budget.cost_of(on) <= limit:
                break
            masks = torch.where(rows <= row, falling, self.masks)
            on = _Grid(self.budget, masks, self.divisor, self.floor).lowest()
        return on

    def filled(self, on: Tensor, limit: int) -> Tensor:
        """The best dropped channels switched on again, as far as the limit allows."""
        if self.divisor is None:
            return _fill(self.budget, self.masks, on, limit)
        return _fill_with_multiples(self.budget, self.masks, on, limit, self.divisor)


def _fill_with_multiples(budget: MacBudget, masks: Tensor, on: Tensor, limit: int, divisor: Divisor) -> Tensor:
    """Lets one layer after the other grow by a multiple, that with the highest dropped mask first."""
    rows = budget.tables(torch.device("cpu")).entry_row
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
