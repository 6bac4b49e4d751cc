"""A network in which every tensor is narrower by the same part: the control that pruning has to beat (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import MacBudget
from .divisor import divisor_of
from .freeze import project

__all__ = ["narrow_pattern", "weight_norms"]


def narrow_pattern(
    budget: MacBudget, target: float, divisor: int | str = 1, importance: Tensor | None = None
) -> Tensor:
    """The pattern at or under a target under which every tensor keeps the same part of its channels.

    A channel counts by its place in the tensor that its layer reads it from: the first of n by 1, the last by 1/n. What
    counts least goes first, over the whole network. Each part of a concatenation is a tensor of its own. Give all
    readers of a tensor the same masks (:func:`mmitp.pruning.share_masks`), and the small network has no gathers where
    they can have them.

    Args:
        budget: the model's budget.
        target: ``psi*``, part of the dense operations (or whatever the budget counts).
        divisor: every layer reads and computes a multiple of this many channels, or all it has, see
            :func:`~mmitp.pruning.project`.
        importance: flat, by which the channels of a tensor are put in order, the largest first; by default they stay in
            theirs.

    Returns:
        ``(N,)`` bool, flat over all counting masks (see :meth:`MacBudget.split`). With single channels (``divisor=1``)
        every tensor's width is at most a channel away from the same part of its dense one.

    Raises:
        ValueError: the target is not in (0, 1], or even the cheapest pattern costs more; ``importance`` is not one
            finite number for each mask entry.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import MacBudget, freeze_masks, mask_model, narrow_pattern, share_masks, slim
        >>> x = torch.randn(1, 3, 5, 5)
        >>> net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)))
        >>> _ = share_masks(net, x)
        >>> budget = MacBudget(net, x)
        >>> _ = freeze_masks(net, budget.split(narrow_pattern(budget, 0.6)))
        >>> slim(net, x, budget)
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
          (1): Conv2d(4, 3, kernel_size=(1, 1), stride=(1, 1))
          (2): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    source = budget.tables(torch.device("cpu")).entry_source
    order = torch.arange(budget.n_entries)
    if importance is not None:
        finite = isinstance(importance, Tensor) and bool(torch.isfinite(importance).all())
        if not finite or importance.shape != order.shape:
            raise ValueError(
                f"importance must be a vector of {len(order)} finite numbers, one for each entry of the masks that "
                "count (budget.n_entries), in the order of budget.flat_masks()"
            )
        order = importance.cpu().argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    for number in source.unique():
        mine = order[source[order] == number]
        place[mine] = torch.arange(len(mine))
    sizes = source.bincount()
    values = 1 - place / sizes[source]
    pattern = project(budget, target, divisor=divisor, masks=values).pattern
    # What is left below the target: a step more for each tensor, where it fits and all stay a step from one part.
    kept, step = source[pattern].bincount(minlength=len(sizes)), divisor_of(sizes, divisor)
    for number in (kept / sizes).argsort(stable=True):
        if kept[number] / sizes[number] <= ((kept + step) / sizes).min():
            wider = (source == number) & (place < kept[number] + step[number])
            found = project(budget, target, divisor=divisor, masks=torch.where(pattern | wider, values, -1.0)).pattern
            if bool((found >= pattern).all()):
                pattern = found
    return pattern


def weight_norms(budget: MacBudget) -> Tensor:
    """How large the weights are that read each channel: their L1 norm over the mean of the layer, flat.

    Summed over all layers that read the channel by one mask, shared or tied.
    """
    by_mask: dict[int, Tensor] = {}
    for record in budget.layers:
        layer = record.mask
        if layer is None:
            continue
        weight = layer.weight.detach().abs().cpu().movedim(layer.weight_in_dim, 0).flatten(1).sum(1)
        norms = weight / weight.mean().clamp(min=1e-30)
        key = id(layer.prune_mask)
        by_mask[key] = by_mask[key] + norms if key in by_mask else norms
    flat = torch.cat([by_mask[id(layer.prune_mask)] for _, layer in budget.masked])
    copies = budget.copies(flat.device)
    return flat if copies is None else copies.summed(flat)
