"""From the channel graph to the needs of each channel: which mask entries keep it.

A channel is needed while any of its readers keeps it (S2: ``1 - prod(1 - M_b)`` over the readers), so its need is an OR
over mask entries, found once per graph. Channels that the same entries keep have one *reader set*: they are needed or
not together. Channels that a barrier, an unmasked layer or the model's output reads are always needed; so are channels
that nobody reads at all: leaving them out would be a free saving.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import ChannelGraph, LayerRecord


@dataclass
class Needs:
    """The entries of all masks in one vector, and the reader sets: which of them keep a channel.

    Attributes:
        layer_entries: of every layer its mask's entries in that vector, ``(N,)`` int64, or None without a mask that
            counts. Layers that share one mask have the same, tied masks have some in common. New ones are numbered on.
        n_entries: length of that vector.
        node_set: ``(n_nodes,)`` int64, reader set of each node, -1 for always needed.
        pairs: ``(2, P)`` int64: every reader set (row 0) with every entry in it (row 1).
        n_sets: number of reader sets.
        dead: layers (by index) whose output nobody reads; they are held at their full size.
    """

    layer_entries: list[Tensor | None]
    n_entries: int
    node_set: Tensor
    pairs: Tensor
    n_sets: int
    dead: set[int]


def channel_masked(record: LayerRecord) -> bool:
    """Whether the layer carries one mask value an input channel."""
    return record.mask is not None and record.mask.mask_granularity == "channel"


def solve_needs(graph: ChannelGraph) -> Needs:
    """Resolves every node's need to a set of mask entries by one pass backwards through the graph."""
    always = graph.always.clone()
    dead = _dead_layers(graph, always)
    layer_entries: list[Tensor | None] = []
    numbers_of: dict[int, Tensor] = {}
    tied: dict[int, int] = {}
    n_entries = 0
    reads: dict[int, set[int]] = {}
    for index, record in enumerate(graph.layers):
        if record.mask is None or index in dead:
            layer_entries.append(None)
        else:
            mask, ties = record.mask.prune_mask, record.mask.mask_ties
            if id(mask) not in numbers_of:
                if ties is None:  # single weights can be millions
                    numbers_of[id(mask)] = torch.arange(n_entries, n_entries + mask.numel())
                    n_entries += mask.numel()
                else:
                    new = [key for key in dict.fromkeys(ties.tolist()) if key not in tied]
                    tied.update(zip(new, range(n_entries, n_entries + len(new)), strict=True))
                    n_entries += len(new)
                    numbers_of[id(mask)] = torch.tensor([tied[key] for key in ties.tolist()])
            layer_entries.append(numbers_of[id(mask)])
        entries = layer_entries[-1]
        for call in record.calls:
            if call.in_ids is None:
                continue
            if entries is None or not channel_masked(record):
                if record.groups == 1:
                    always[call.in_ids] = True
                continue
            for entry, node in zip(entries.tolist(), call.in_ids.tolist(), strict=True):
                reads.setdefault(node, set()).add(entry)
    always = _spread_backwards(graph.edges, always)

    entries_of = _entry_sets(graph, always, reads)
    node_set = torch.full((graph.n_nodes,), -1, dtype=torch.long)
    numbers: dict[frozenset[int], int] = {}
    for node, kept_by in entries_of.items():
        node_set[node] = numbers.setdefault(kept_by, len(numbers))
    pairs = [(number, entry) for kept_by, number in numbers.items() for entry in sorted(kept_by)]
    return Needs(
        layer_entries,
        n_entries,
        node_set,
        torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t().contiguous(),
        len(numbers),
        dead,
    )


def _spread_backwards(edges: Tensor, flags: Tensor) -> Tensor:
    """Sources of flagged nodes are flagged, to the end."""
    src, dst = edges
    flags = flags.clone()
    count = -1
    while (now := int(flags.sum())) != count:
        count = now
        flags[src[flags[dst]]] = True
    return flags


def _dead_layers(graph: ChannelGraph, always: Tensor) -> set[int]:
    """Layers none of whose outputs is read; marks every unread node as always needed on the way."""
    useful = always.clone()
    for record in graph.layers:
        for call in record.calls:
            if call.in_ids is not None and record.groups == 1:
                useful[call.in_ids] = True
    useful = _spread_backwards(graph.edges, useful)
    always |= ~useful
    return {i for i, r in enumerate(graph.layers) if r.module is not None and not bool(useful[r.out_nodes].any())}


def _entry_sets(graph: ChannelGraph, always: Tensor, reads: dict[int, set[int]]) -> dict[int, frozenset[int]]:
    src, dst = graph.edges
    keep = ~always[src] & ~always[dst]
    order = torch.argsort(src[keep], stable=True)
    src, dst = src[keep][order].tolist(), dst[keep][order].tolist()
    after: dict[int, list[int]] = {}
    for s, d in zip(src, dst, strict=True):
        after.setdefault(s, []).append(d)
    nodes = (~always).nonzero().flatten().tolist()
    interned: dict[frozenset[int], frozenset[int]] = {}
    sets: dict[int, frozenset[int]] = {}
    nothing: frozenset[int] = frozenset()
    changed = True
    # Nodes are numbered in the order of execution, so one pass backwards settles nearly all; modules that run several
    # times link back, and the repeated passes settle those.
    while changed:
        changed = False
        for node in reversed(nodes):
            own = reads.get(node)
            nexts = [sets.get(d, nothing) for d in after.get(node, ())]
            if own is None and len(nexts) == 1:
                new = nexts[0]
            else:
                union = frozenset(own or ()).union(*nexts)
                new = interned.setdefault(union, union)
            if sets.get(node) != new:
                sets[node] = new
                changed = True
    return sets


class KeptChannels:
    """Which channels the tensors of the slimmed network keep, needed or not: a function without a loop.

    A tensor keeps what is needed, what its code fixes the place of, and what is coupled to either.

    Args:
        graph: the model's graph.
        present: ``(n_nodes,)`` bool, what tensors carry as yet, where a part has been cut off before: nothing else can
            be kept from then on. By default all.
    """

    def __init__(self, graph: ChannelGraph, present: Tensor | None = None) -> None:
        layers = [record for record in graph.layers if record.module is not None]
        grouped = [record for record in layers if record.groups > 1]

        def ints(parts: list[Tensor]) -> Tensor:
            return torch.cat([*parts, torch.empty(0, dtype=torch.long)])

        cpu = dict(
            fixed=graph.fixed,
            # every output of a grouped layer, and the group that computes it
            grouped=ints([r.out_nodes for r in grouped]),
            group=ints([r.group_nodes.repeat_interleave(r.n_out // r.groups) for r in grouped]),
            # every output with the number of its layer, and every layer's first output that is there
            outputs=ints([r.out_nodes for r in layers]),
            layer=ints([torch.full_like(r.out_nodes, i) for i, r in enumerate(layers)]),
            first=ints([(r.out_nodes if present is None else r.out_nodes[present[r.out_nodes]])[:1] for r in layers]),
            component=components(graph.n_nodes, graph.coupled),
        )
        self._vectors = {torch.device("cpu"): cpu}

    def __call__(self, needed: Tensor) -> Tensor:
        """``(n_nodes,)`` bool: the channels kept, from those that are needed; on the device of ``needed``."""
        if needed.device not in self._vectors:
            cpu = self._vectors[torch.device("cpu")]
            self._vectors[needed.device] = {key: value.to(needed.device) for key, value in cpu.items()}
        v = self._vectors[needed.device]
        kept = needed | v["fixed"]
        # A live group computes all its outputs, also those no reader keeps.
        kept = kept.index_put((v["grouped"],), kept[v["grouped"]] | needed[v["group"]])
        # A layer of which nothing is needed still has to hand on a tensor of at least one channel.
        any_output = torch.zeros_like(v["first"]).index_add_(0, v["layer"], kept[v["outputs"]].long()) > 0
        kept = kept.index_put((v["first"],), kept[v["first"]] | ~any_output)
        component = v["component"]
        return (torch.zeros_like(component).index_add_(0, component, kept.long()) > 0)[component]


def components(n: int, edges: Tensor) -> Tensor:
    """``(n,)`` int64: the lowest node that each node is linked to, whichever way and however far."""
    a, b = torch.cat([edges, edges.flip(0)], 1)
    label = torch.arange(n)
    while True:
        lower = label.scatter_reduce(0, b, label[a], "amin")
        lower = lower[lower]
        if torch.equal(lower, label):
            return label
        label = lower
