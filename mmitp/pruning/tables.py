"""Index vectors of the budget: whose entries and channels each layer's cost is made of, all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .graph import ChannelGraph, LayerRecord
from .needs import Needs, channel_masked


@dataclass
class Tables:
    """Index vectors of the budget, all on one device.

    Mask entries and reader sets (of channels that the same entries keep) are those of
    :class:`~mmitp.pruning.needs.Needs`. Rows are layers, in the order of :attr:`MacBudget.layers`: ``L`` of them, with
    ``N`` entries.

    Attributes:
        pair: ``(L,)`` float64, MACs that an (input, output) pair of channels costs.
        inp: ``(L,)`` float64, MACs that an input costs besides, while the layer computes any output at all.
        fixed: ``(L,)`` float64, MACs that stay in any case.
        in_const: ``(L,)`` float64, inputs that no mask can drop.
        out_const: ``(L,)`` float64, outputs that are always needed.
        entry_row: ``(N,)`` int64, the row an entry is counted under (the first of those that share its mask).
        entry_part: ``(N,)`` int64, the number of its mask, or of the part of a tied one that the same layers read: none
            of these loses its last entry.
        entry_source: ``(N,)`` int64, the number of the tensor that the layer reads the entry's channel from: one
            a layer, several where it reads a concatenation.
        in_row, in_entry: ``(I,)`` int64, row and entry of every masked input (of every row that shares a mask).
        set_of, set_row: ``(K,)`` int64, reader set and row of every reader set that a row computes channels of.
        set_weight: ``(K,)`` float64, how many outputs of that row they are.
        pair_set, pair_entry: ``(P,)`` int64, every reader set with every entry in it.
        entry_count: ``(L,)`` int64, mask entries that are counted under each row, those cut off since included.
        source_count: ``(S,)`` int64, mask entries of each source, those cut off since included.
        node_set: ``(n_nodes,)`` int64, every node's reader set, ``n_sets`` for those that are always needed.
        n_sets: number of reader sets.
        n_parts: number of masks and of parts of tied ones.
    """

    pair: Tensor
    inp: Tensor
    fixed: Tensor
    in_const: Tensor
    out_const: Tensor
    entry_row: Tensor
    entry_part: Tensor
    entry_source: Tensor
    in_row: Tensor
    in_entry: Tensor
    set_of: Tensor
    set_row: Tensor
    set_weight: Tensor
    pair_set: Tensor
    pair_entry: Tensor
    node_set: Tensor
    entry_count: Tensor
    source_count: Tensor
    n_sets: int
    n_parts: int

    def without(self, keep: Tensor) -> Tables:
        """The tables once the entries not in ``keep`` (``(N,)`` bool) are off for good and no more in the vectors."""
        number = keep.long().cumsum(0) - 1
        inputs, pairs = keep[self.in_entry], keep[self.pair_entry]
        return replace(
            self,
            entry_row=self.entry_row[keep],
            entry_source=self.entry_source[keep],
            entry_part=self.entry_part[keep],
            in_row=self.in_row[inputs],
            in_entry=number[self.in_entry[inputs]],
            pair_set=self.pair_set[pairs],
            pair_entry=number[self.pair_entry[pairs]],
        )

    def to(self, device: torch.device) -> Tables:
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Tables(**moved)

    def needs(self, on: Tensor) -> tuple[Tensor, Tensor]:
        """How many entries of each reader set are on, and whether any is: ``(n_sets,)`` in the type of ``on``.

        ``on``: ``(N,)``, the entries as floats of 0 and 1.
        """
        readers = on.new_zeros(self.n_sets).index_add_(0, self.pair_set, on[self.pair_entry])
        return readers, (readers > 0).to(on.dtype)

    def channels(self, on: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
        """Kept inputs and needed outputs of every layer: ``(L,)`` float64 each, from :meth:`needs`."""
        n_in = self.in_const.index_add(0, self.in_row, on[self.in_entry])
        n_out = self.out_const.index_add(0, self.set_row, needed[self.set_of] * self.set_weight)
        return n_in, n_out


@dataclass
class Copies:
    """The masks of all layers, one after the other, and the entries of the flat vectors they are copies of.

    Attributes:
        entry: ``(M,)`` int64, the entry of every mask value.
        first: ``(N,)`` int64, the first mask value of every entry.
    """

    entry: Tensor
    first: Tensor

    @classmethod
    def of(cls, entry: Tensor, n: int) -> Copies:
        first = torch.full((n,), len(entry)).scatter_reduce(0, entry, torch.arange(len(entry)), "amin")
        return cls(entry, first)

    def without(self, keep: Tensor) -> Copies:
        """Once the entries not in ``keep`` (``(N,)`` bool) are cut off."""
        number = keep.long().cumsum(0) - 1
        return Copies.of(number[self.entry[keep[self.entry]]], int(keep.sum()))

    def summed(self, values: Tensor) -> Tensor:
        """``(N,)``: the sum over every entry's copies."""
        return values.new_zeros(len(self.first)).index_add(0, self.entry, values)

    def one_of_each(self, values: Tensor) -> Tensor:
        """``(N,)``: copies are equal; the gradient of an entry is that of each of them."""
        picked = values.detach()[self.first]
        return picked + self.summed(values - values.detach()) if values.requires_grad else picked


def tables_of(graph: ChannelGraph, needs: Needs) -> Tables:
    """The index vectors of a recorded network, on the CPU."""
    pair, inp, fixed, in_const, out_const = [], [], [], [], []
    entry_row: list[Tensor] = []
    entry_part = torch.zeros(needs.n_entries, dtype=torch.long)
    entry_source = torch.full((needs.n_entries,), torch.iinfo(torch.long).max)
    n_sources = 0
    parts: dict[int, int] = {}  # the first entry of every part -> its number
    in_row: list[Tensor] = []
    in_entry: list[Tensor] = []
    set_of, set_row, set_weight = [], [], []
    for row, (record, entries) in enumerate(zip(graph.layers, needs.layer_entries, strict=True)):
        masked = entries is not None and record.mask is not None
        per_weight = masked and not channel_masked(record)
        pair.append(record.pair_macs // (1 if not per_weight else kernel_size(record)))
        # Single weights are masked in the product alone; what costs an input besides (offsets) stays dense.
        inp.append(0 if per_weight else record.input_macs)
        fixed.append(record.own_macs + (record.input_macs * record.n_in if per_weight else 0))
        if masked:
            assert entries is not None
            in_row.append(torch.full_like(entries, row))
            in_entry.append(entries)
            first = sum(map(len, entry_row))  # entries below it are counted under the rows before
            new = int(entries.max()) + 1 - first if len(entries) else 0
            entry_row.append(torch.full((max(new, 0),), row))
            source, n = _sources_of(record, entries, graph.tensors)
            ours = entries >= first
            entry_source.scatter_reduce_(0, entries[ours], n_sources + source[ours], "amin")
            n_sources += n
            assert record.mask is not None
            for part in _parts_of(entries, record.mask.mask_parts):
                entry_part[part] = parts.setdefault(int(part.min()), len(parts))
        in_const.append(0 if masked else record.n_in // record.groups)
        if per_weight:
            out_const.append(1)
            continue
        nodes, width = record.output_nodes()
        sets, counts = needs.node_set[nodes].unique(return_counts=True)
        out_const.append(int(counts[sets < 0].sum()) * width)
        set_of.append(sets[sets >= 0])
        set_weight.append(counts[sets >= 0] * width)
        set_row.append(torch.full_like(set_of[-1], row))

    entry_source = entry_source.unique(return_inverse=True)[1]

    def ints(chunks: Sequence[Tensor]) -> Tensor:
        return torch.cat([*chunks, torch.empty(0, dtype=torch.long)])

    def floats(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Tables(
        floats(pair),
        floats(inp),
        floats(fixed),
        floats(in_const),
        floats(out_const),
        ints(entry_row),
        entry_part,
        entry_source,
        ints(in_row),
        ints(in_entry),
        ints(set_of),
        ints(set_row),
        ints(set_weight).double(),
        needs.pairs[0],
        needs.pairs[1],
        torch.where(needs.node_set < 0, needs.n_sets, needs.node_set),
        torch.bincount(ints(entry_row), minlength=len(graph.layers)),
        torch.bincount(entry_source),
        needs.n_sets,
        len(parts),
    )


def kernel_size(record: LayerRecord) -> int:
    """Weights of a masked layer between one input and one output channel."""
    assert record.mask is not None
    return record.mask.weight[0, 0].numel()


def _sources_of(record: LayerRecord, entries: Tensor, tensors: Tensor) -> tuple[Tensor, int]:
    """The tensors that a masked layer's entries are channels of, numbered from 0, and how many they are."""
    nodes = record.calls[0].in_ids
    if nodes is None or not channel_masked(record):
        return torch.zeros_like(entries), 1
    found, number = tensors[nodes].unique(return_inverse=True)
    return number, len(found)


def _parts_of(entries: Tensor, numbers: Tensor | None) -> list[Tensor]:
    """A mask's entries, those of each part of a tied one apart."""
    if numbers is None:
        return [entries] if len(entries) else []
    return [entries[numbers == number] for number in numbers.unique().tolist()]
