"""From the channel graph to the needs of each channel: which mask entries keep it.

A channel is needed while any of its readers keeps it (S2: ``1 - prod(1 - M_b)`` over the readers), so its need is an OR
over mask entries, found once per graph. The entries of all masks in one vector are the *literals* of these expressions,
and channels with the same expression form a *class*: they come and go together. Channels that a barrier, an unmasked
layer or the model's output reads are always needed; so are channels that nobody reads at all: leaving them out would be
a free saving.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import ChannelGraph, LayerRecord


@dataclass
class Needs:
    """Literals (mask entries) and the classes of nodes that share the same set of them.

    Attributes:
        literal_start: a number a layer, the offset of its mask in the vector of literals, or -1 without a mask that
            counts; layers that share one mask have the same.
        n_literals: length of that vector.
        node_class: ``(n_nodes,)`` int64, class of each node, -1 for always needed.
        pairs: ``(2, P)`` int64: every class (row 0) with every literal that keeps it (row 1).
        n_classes: number of classes.
        dead: layers (by index) whose output nobody reads; they are held at their full size.
    """

    literal_start: list[int]
    n_literals: int
    node_class: Tensor
    pairs: Tensor
    n_classes: int
    dead: set[int]


def channel_masked(record: LayerRecord) -> bool:
    """Whether the layer carries one mask value an input channel."""
    return record.mask is not None and record.mask.mask_granularity == "channel"


def solve_needs(graph: ChannelGraph) -> Needs:
    """Resolves every node's need to a set of literals by one pass backwards through the graph."""
    always = graph.always.clone()
    dead = _dead_layers(graph, always)
    starts: list[int] = []
    n_literals = 0
    start_of: dict[int, int] = {}
    reads: dict[int, set[int]] = {}
    for index, record in enumerate(graph.layers):
        if record.mask is None or index in dead:
            starts.append(-1)
        elif (known := start_of.get(id(record.mask.prune_mask))) is not None:
            starts.append(known)
        else:
            starts.append(n_literals)
            start_of[id(record.mask.prune_mask)] = n_literals
            n_literals += record.mask.prune_mask.numel()
        for call in record.calls:
            if call.in_ids is None:
                continue
            if starts[-1] < 0 or not channel_masked(record):
                if record.groups == 1:
                    always[call.in_ids] = True
                continue
            for channel, node in enumerate(call.in_ids.tolist()):
                reads.setdefault(node, set()).add(starts[-1] + channel)
    always = _spread_backwards(graph.edges, always)

    sets = _literal_sets(graph, always, reads)
    node_class = torch.full((graph.n_nodes,), -1, dtype=torch.long)
    classes: dict[frozenset[int], int] = {}
    for node, literals in sets.items():
        node_class[node] = classes.setdefault(literals, len(classes))
    pairs = [(c, literal) for literals, c in classes.items() for literal in sorted(literals)]
    return Needs(
        starts,
        n_literals,
        node_class,
        torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t().contiguous(),
        len(classes),
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


def _literal_sets(graph: ChannelGraph, always: Tensor, reads: dict[int, set[int]]) -> dict[int, frozenset[int]]:
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


def carried_channels(graph: ChannelGraph, needed: Tensor, whole_tensors: bool = False) -> Tensor:
    """``(n_nodes,)`` bool: the channels that tensors of the slimmed network carry, needed or not.

    A tensor carries what is needed, what its code fixes the place of, and what is coupled to either.

    Args:
        graph: the model's graph.
        needed: ``(n_nodes,)`` bool, the channels that are needed.
        whole_tensors: every tensor keeps its full width.
    """
    carried = needed | graph.fixed
    if whole_tensors:
        carried[:] = True
    for record in graph.layers:
        if record.groups > 1 and record.module is not None:
            # A live group computes all its outputs, also those no reader keeps.
            live = needed[record.group_nodes].repeat_interleave(record.n_out // record.groups)
            carried[record.out_nodes[live]] = True
        if record.module is not None and not bool(carried[record.out_nodes].any()):
            # A layer of which nothing is needed still has to hand on a tensor of at least one channel.
            carried[record.out_nodes[0]] = True
    return _spread_backwards(torch.cat([graph.coupled, graph.coupled.flip(0)], 1), carried)
