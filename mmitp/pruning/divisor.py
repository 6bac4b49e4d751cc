"""Kept channel numbers as multiples of 8 or 16, which CPUs and GPUs like best, or of less in narrow layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmitp.values import is_number

from .budget import MacBudget
from .masks import ranks
from .needs import channel_masked

#: with ``'auto'``: multiples of the first that leaves a layer at least so many numbers of channels to choose from
AUTO, CHOICES = (8, 4, 2, 1), 8


def divisor_of(width: Tensor, divisor: int | str) -> Tensor:
    """Of how many channels layers keep a multiple.

    Args:
        width: channels of the dense layers, any shape, int64.
        divisor: 8, 16, ... for all of them; or ``'auto'``: 8 from 64 channels on, 4 from 32, 2 from 16, 1 below, so
            that a step is one channel, or at most an eighth of a layer.

    Example:
        >>> import torch
        >>> divisor_of(torch.tensor([3, 16, 24, 32, 64, 2048]), "auto")
        tensor([1, 2, 2, 4, 8, 8])
    """
    if divisor != "auto":
        return torch.full_like(width, int(divisor))
    result = torch.ones_like(width)
    for step in reversed(AUTO):
        result = torch.where(width >= step * CHOICES, step, result)
    return result


def check_divisor(divisor: int | str) -> None:
    """Refuses what is no divisor.

    Raises:
        ValueError: neither ``'auto'`` nor a positive whole number.
    """
    if not (divisor == "auto" or is_number(divisor) and divisor == int(divisor) and divisor >= 1):
        raise ValueError(f"divisor must be a positive whole number of channels, or 'auto', got {divisor!r}")


@dataclass
class _Counts:
    """Channels read (``n_in``) and computed (``n_out``) by every layer under a pattern, ``(layers,)`` int64, and which
    reader sets are needed, ``(n_sets,)`` bool."""

    n_in: Tensor
    n_out: Tensor
    needed: Tensor


class Divisor:
    """Makes patterns whose layers read and compute multiples of a divisor, or all they have.

    Args:
        budget: the model's budget.
        divisor: 8, 16, ..., or ``'auto'``, see :func:`divisor_of`.

    Attributes:
        all_in, all_out: ``(layers,)`` int64, channels of the dense layers; inputs are those of one group.
        step_in, step_out: ``(layers,)`` int64, of how many channels their numbers are multiples.
        counts_in, counts_out: ``(layers,)`` bool, whether the layer's number of inputs or outputs can change.
    """

    def __init__(self, budget: MacBudget, divisor: int | str) -> None:
        self.budget, self.tables = budget, budget.tables(torch.device("cpu"))
        self.all_in = torch.tensor([r.n_in // r.groups for r in budget.layers])
        self.all_out = torch.tensor([r.n_out for r in budget.layers])
        self.step_in, self.step_out = divisor_of(self.all_in, divisor), divisor_of(self.all_out, divisor)
        entries = budget.needs.layer_entries
        masked = [e is not None and channel_masked(r) for e, r in zip(entries, budget.layers, strict=True)]
        # A mask on single weights removes no channel, and functional layers stay as they are.
        self.counts_in = torch.tensor(masked)
        self.counts_out = torch.tensor(
            [r.module is not None and (m or e is None) for r, e, m in zip(budget.layers, entries, masked, strict=True)]
        )

    def counts(self, on: Tensor) -> _Counts:
        _, needed = self.tables.needs(on.double())
        n_in, n_out = self.tables.channels(on.double(), needed)
        return _Counts(n_in.long(), n_out.long(), needed > 0)

    def missing(self, counts: _Counts) -> tuple[Tensor, Tensor]:
        """Channels that every layer's inputs and outputs are short of the next allowed number."""
        up_in = torch.minimum(-counts.n_in % self.step_in, self.all_in - counts.n_in)
        up_out = torch.minimum(-counts.n_out % self.step_out, self.all_out - counts.n_out)
        return up_in * self.counts_in, up_out * self.counts_out

    def nearest(self, masks: Tensor, on: Tensor) -> Tensor:
        """Drops each layer's lowest masks down to a multiple that is no further away than the one above."""
        rows = self.tables.entry_row
        place = ranks(torch.where(on, masks, -torch.inf), rows, len(self.all_in))
        n_in = self.counts(on).n_in
        excess = n_in % self.step_in
        down = (2 * excess <= self.step_in) & (n_in > self.step_in) & (n_in < self.all_in)
        own = torch.zeros_like(n_in).index_add_(0, rows, on.long())  # less than n_in where the mask is tied to others
        stays = place < torch.where(down & (own > excess), own - excess, own)[rows]
        return on & (stays | self.budget.last_of_parts(torch.where(on, masks, -torch.inf)))

    def up(self, masks: Tensor, on: Tensor) -> Tensor:
        """Switches on the best dropped masks until every number is allowed; ends at the dense network at the latest.

        Computed channels come first, the layer with the most ahead, so that those which feed fewer readers can grow
        within them; what a reader lacks it then takes from what is computed anyhow.
        """
        on = on.clone()
        t = self.tables
        while True:
            counts = self.counts(on)
            in_short, out_short = self.missing(counts)
            if not bool(in_short.any() or out_short.any()):
                return on
            # Layers at an allowed number that an entry would disturb by making a channel computed.
            settled = (out_short == 0) & self.counts_out
            set_harm = torch.zeros(t.n_sets, dtype=torch.long).index_add_(0, t.set_of, settled[t.set_row].long())
            harm = torch.zeros(len(on), dtype=torch.long).index_add_(
                0, t.pair_entry, set_harm[t.pair_set] * ~counts.needed[t.pair_set]
            )
            if bool(out_short.any()):
                row = int(torch.where(out_short > 0, counts.n_out, -1).argmax())
                mine = torch.zeros(t.n_sets, dtype=torch.bool)
                mine[t.set_of[t.set_row == row]] = True
                mine &= ~counts.needed
                pairs = mine[t.pair_set]
                entries, sets, short = t.pair_entry[pairs], t.pair_set[pairs], int(out_short[row])
            else:
                row = int(in_short.argmax())
                entries = t.in_entry[t.in_row == row]
                entries = entries[~on[entries]]
                sets, short = entries, int(in_short[row])
            chosen = _best(entries, sets, harm[entries], masks[entries], short)
            on[chosen] = True


def _best(entries: Tensor, sets: Tensor, harm: Tensor, masks: Tensor, count: int) -> Tensor:
    """Up to ``count`` entries of different reader sets: those of least harm, of these the highest."""
    order = masks.argsort(descending=True, stable=True)
    order = order[harm[order].argsort(stable=True)]
    least = harm[order[0]]
    chosen: list[int] = []
    seen: set[int] = set()
    for i in order.tolist():
        if len(chosen) == count or harm[i] != least:
            break
        if int(sets[i]) not in seen:
            seen.add(int(sets[i]))
            chosen.append(int(entries[i]))
    return torch.tensor(chosen)
