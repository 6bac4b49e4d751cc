"""Labels: which channels the elements of each tensor of a pass belong to.

Every channel of every layer's output is a node. A tensor's label is an int64 array of nodes that broadcasts to the
tensor's shape, with size 1 along every dimension that no channel varies along: ``(1, C, 1, 1)`` for a feature map. So
views, permutations, flattenings and shuffles are followed by doing to the label what was done to the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Labels:
    """Nodes and edges of the graph that is being recorded, and the labels of the tensors of the present pass.

    Labels are kept by tensor identity, with a strong reference to each tensor.

    Attributes:
        n_nodes: number of nodes so far.
        parameters: id of each of the model's parameters -> its name.
        unfollowed: name of a module -> why something in it stays whole.
        stack: names of the modules that are running, the innermost last.
    """

    def __init__(self, model: nn.Module) -> None:
        self.n_nodes = 0
        self._firsts: list[int] = []  # the first node of every tensor that has nodes of its own
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.unfollowed: dict[str, str] = {}
        self.stack: list[str] = []
        self._root = type(model).__name__
        self._edges: list[Tensor] = []
        self._coupled: list[Tensor] = []
        self._always: list[Tensor] = []
        self._fixed: list[Tensor] = []
        self._ids: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._storages: dict[int, list[Tensor]] = {}
        self._image: set[int] = set()  # ids of tensors that no layer lies before

    def clear(self) -> None:
        """Forgets the tensors of a pass; nodes and edges stay."""
        self._ids.clear()
        self._storages.clear()
        self._image.clear()

    def place(self) -> str:
        """Name of the module that is running."""
        return (self.stack and self.stack[-1]) or self._root

    # -- tensors

    def ids(self, tensor: Tensor) -> Tensor | None:
        """The tensor's label, or None where no channel of it is followed."""
        entry = self._ids.get(id(tensor))
        return entry[1] if entry is not None else None

    def is_derived(self, tensor: Tensor) -> bool:
        """Whether the tensor is known to come from the model's input."""
        return id(tensor) in self._ids

    def label(self, tensor: Tensor, ids: Tensor) -> None:
        """Gives a tensor its label, of as many dimensions as the tensor."""
        assert ids.dim() == tensor.dim(), (ids.shape, tensor.shape)
        self._remember(tensor, ids)

    def pass_on(self, ids: Tensor, source: Tensor, *outputs: Tensor) -> None:
        """Gives outputs the label of the tensor that they were made of; a barrier where it does not fit."""
        for t in outputs:
            if t.dim() == ids.dim() and all(i in (1, size) for i, size in zip(ids.shape, t.shape, strict=True)):
                self.label(t, ids)
            else:
                self.barrier([source], [t], None)

    def mark_derived(self, *tensors: Tensor) -> None:
        """Known to come from the input, with no channel to follow."""
        for tensor in tensors:
            if id(tensor) not in self._ids:
                self._remember(tensor, None)

    def _remember(self, tensor: Tensor, ids: Tensor | None) -> None:
        if id(tensor) not in self._ids and tensor.layout == torch.strided:
            self._storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._ids[id(tensor)] = (tensor, ids)

    def has_aliases(self, tensor: Tensor) -> bool:
        """Whether another tensor of the pass shares the memory, and would change with an in-place operation."""
        if tensor.layout != torch.strided:
            return False
        return any(t is not tensor for t in self._storages.get(tensor.untyped_storage().data_ptr(), ()))

    # -- nodes

    def new_nodes(self, *shape: int) -> Tensor:
        """New nodes as a label of this shape."""
        first = self.n_nodes
        self._firsts.append(first)
        self.n_nodes += math.prod(shape)
        return torch.arange(first, self.n_nodes).view(shape)

    def need(self, source: Tensor, destination: Tensor) -> None:
        """Every source node is needed where its destination is."""
        self._edges.append(torch.stack([source.reshape(-1), destination.reshape(-1)]))

    def couple(self, a: Tensor, b: Tensor) -> None:
        """Tensors keep the nodes of each pair both or not at all: coupled channels."""
        self._coupled.append(torch.stack([a.reshape(-1), b.reshape(-1)]))

    def read_all(self, ids: Tensor) -> None:
        """These nodes are needed in any case."""
        self._always.append(ids.reshape(-1).unique())

    def fix(self, ids: Tensor) -> None:
        """The places of these nodes in their tensors are fixed: the tensors keep their width."""
        self._fixed.append(ids.reshape(-1).unique())

    def barrier(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor], reason: str | None) -> None:
        """Something reads all that it is given, and nothing of its outputs is followed.

        Args:
            inputs: what it reads.
            outputs: what it gives.
            reason: for ``unfollowed``; None for what needs no mention.
        """
        for t in inputs:
            if (ids := self.ids(t)) is not None:
                self.read_all(ids)
                self.fix(ids)
        for t in outputs:
            self._remember(t, None)
            self._image.discard(id(t))
        if reason is not None:
            self.unfollowed.setdefault(self.place(), reason)

    # -- the image

    def start_at(self, tensors: Iterable[Tensor]) -> None:
        """A pass begins at these tensors."""
        for tensor in tensors:
            self.mark_derived(tensor)
            self._image.add(id(tensor))

    def is_image(self, tensor: Tensor) -> bool:
        """Whether no layer lies between the model's input and this tensor."""
        return id(tensor) in self._image

    def mark_image(self, sources: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """What is made of the input alone, without a layer, is the image still."""
        derived = [t for t in sources if self.is_derived(t)]
        matrix = any(id(t) in self.parameters and is_matrix(t) for t in sources)
        image = bool(derived) and all(map(self.is_image, derived)) and not matrix
        for t in outputs:
            if image:
                self.mark_derived(t)
                self._image.add(id(t))
            else:
                self._image.discard(id(t))

    # -- result

    def edges(self) -> Tensor:
        """``(2, E)`` int64, see :class:`~mmitp.pruning.graph.ChannelGraph`."""
        return _pairs(self._edges)

    def coupled(self) -> Tensor:
        """``(2, P)`` int64."""
        return _pairs(self._coupled)

    def tensors(self) -> Tensor:
        """``(n_nodes,)`` int64."""
        firsts = torch.tensor(self._firsts, dtype=torch.long)
        return torch.bucketize(torch.arange(self.n_nodes), firsts, right=True)

    def always(self) -> Tensor:
        """``(n_nodes,)`` bool."""
        return self._flags(self._always)

    def fixed(self) -> Tensor:
        """``(n_nodes,)`` bool."""
        return self._flags(self._fixed)

    def _flags(self, chunks: list[Tensor]) -> Tensor:
        out = torch.zeros(self.n_nodes, dtype=torch.bool)
        for nodes in chunks:
            out[nodes] = True
        return out


def _pairs(chunks: list[Tensor]) -> Tensor:
    return torch.cat(chunks, 1) if chunks else torch.empty(2, 0, dtype=torch.long)


def is_matrix(t: Tensor) -> bool:
    """Whether more than one dimension is longer than one."""
    return sum(s > 1 for s in t.shape) > 1


def only_dim(ids: Tensor, dim: int) -> bool:
    """Whether labels vary along this dimension at most."""
    return all(s == 1 for d, s in enumerate(ids.shape) if d != dim % ids.dim())


def compress(ids: Tensor) -> Tensor:
    """Drops to size 1 every dimension along which the labels do not change."""
    for d in range(ids.dim()):
        if ids.shape[d] > 1:
            first = ids.narrow(d, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids.contiguous()
