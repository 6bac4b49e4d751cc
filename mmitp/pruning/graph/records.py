"""What a recorded pass tells: the layers that ran, and the graph of their channels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers import ChannelPad, Conv2dKind
from ..masks import MaskedLayer


@dataclass
class LayerCall:
    """One execution of a layer.

    Attributes:
        in_ids: ``(n_in,)`` int64, the nodes of its input channels. None: of unknown or constant origin.
        pair_macs: MACs of a connected (input, output) pair of channels.
        input_macs: MACs that an input channel costs besides (an offset convolution).
    """

    in_ids: Tensor | None
    pair_macs: int
    input_macs: int


@dataclass
class LayerRecord:
    """A convolution, transposed, deformable convolution or linear layer of the recorded pass.

    Attributes:
        name: module name; of a functional call the name of its weight.
        module: the layer. None: a functional call.
        kind: what the package knows of its type.
        n_in, n_out, groups: as the layer has them.
        out_nodes: ``(n_out,)`` int64, the nodes of its output channels.
        group_nodes: ``(groups,)`` int64, the nodes of the groups of a grouped convolution; ``(0,)`` with one group.
        calls: its executions.
        note: a remark for the budget's table.
        own_macs: MACs of a functional call, all of which stay.
        held: all its channels stay.
        open: its mask does not count, and all its input channels stay.
        reads_image: no other layer lies between the model's input and this one.
    """

    name: str
    module: nn.Module | None
    kind: Conv2dKind | None
    n_in: int
    n_out: int
    groups: int = 1
    out_nodes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    group_nodes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    calls: list[LayerCall] = field(default_factory=list)
    note: str = ""
    own_macs: int = 0
    held: bool = False
    open: bool = False
    reads_image: bool = False

    @property
    def pair_macs(self) -> int:
        """MACs a connected (input, output) pair of channels costs over all calls."""
        return sum(call.pair_macs for call in self.calls)

    @property
    def input_macs(self) -> int:
        """MACs an input channel costs besides, over all calls."""
        return sum(call.input_macs for call in self.calls)

    @property
    def dense_macs(self) -> int:
        """MACs of the unpruned layer over all calls."""
        return self.pair_macs * self.n_in * self.n_out // self.groups + self.input_macs * self.n_in + self.own_macs

    def output_nodes(self) -> tuple[Tensor, int]:
        """The nodes whose needs decide which outputs are computed, and how many outputs each stands for.

        Groups of a grouped convolution, which computes all outputs of a group that lives; else the outputs themselves.
        """
        if self.groups > 1 and len(self.group_nodes):
            return self.group_nodes, self.n_out // self.groups
        return self.out_nodes, 1

    @property
    def mask(self) -> MaskedLayer | None:
        """The layer, if it carries a mask that counts."""
        return self.module if isinstance(self.module, MaskedLayer) and not self.open else None


@dataclass
class ChannelGraph:
    """Nodes (channels) with their needs, the layers, and which channels have to stay side by side.

    Attributes:
        layers: in order of first execution.
        n_nodes: number of nodes.
        tensors: ``(n_nodes,)`` int64, number of the tensor that brought each node into the graph: what a concatenation
            reads carries the numbers of its parts.
        edges: ``(2, E)`` int64; the source (row 0) is needed where the destination (row 1) is.
        always: ``(n_nodes,)`` bool, nodes that a barrier or the model's output reads: needed in any case.
        fixed: ``(n_nodes,)`` bool, nodes whose place in the tensor is fixed by code with channel numbers in it.
        coupled: ``(2, P)`` int64, pairs of coupled channels: the model's code, which slimming does not change, carries
            or drops them only together (the terms of a residual sum). Its connected components are the dependency
            groups of other pruners.
        norms: per-channel modules (BatchNorm, InstanceNorm, PReLU) with the labels of every call, ``(C,)`` int64.
        pads: :class:`ChannelPad` modules with the labels of the output of every call, ``(out_channels,)`` int64.
        unfollowed: name -> reason, for what was kept whole or could not be counted.
    """

    layers: list[LayerRecord]
    n_nodes: int
    tensors: Tensor
    edges: Tensor
    always: Tensor
    fixed: Tensor
    coupled: Tensor
    norms: dict[nn.Module, list[Tensor | None]]
    pads: dict[ChannelPad, list[Tensor | None]]
    unfollowed: dict[str, str]
