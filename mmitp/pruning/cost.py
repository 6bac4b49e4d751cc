"""What a budget counts: MACs, parameters, or the latency measured on the machine at hand.

A cost is a function of how many channels every layer reads and computes, plus what the rest of the network takes. The
paper's cost is MACs; it names measured latency as the next step (S2), which is :mod:`mmitp.pruning.latency`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .graph import shared_parameters
from .layers import Conv2dKind
from .masks import ste_derivative, weights_of
from .needs import channel_masked

if TYPE_CHECKING:
    from .budget import MacBudget
    from .graph import LayerRecord
    from .tables import Tables


class Cost:
    """Interface of a cost, all figures float64 in ``unit``. Nothing here may read a value: training does not wait.

    Attributes:
        what: what it is about, in words.
        unit: what is counted.
    """

    what = unit = ""

    def bind(self, budget: MacBudget, model: nn.Module) -> None:
        """Looks up the layers of a budget; called once, when the budget is made."""
        raise NotImplementedError

    def of_restricted(self, budget: MacBudget) -> Cost:
        """The same cost for a budget of fewer mask entries (:meth:`MacBudget.restricted`)."""
        return self

    def layers(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        """Cost of the layers ``row`` (indices) with so many channels read and computed; all of one shape."""
        raise NotImplementedError

    def smooth(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        """:meth:`layers` without its jumps: the differences of this one are the gradient."""
        return self.layers(row, n_in, n_out)

    def rest(self, on: Tensor) -> Tensor | float:
        """What the network costs besides, under a flat pattern; 0-dim if it is a tensor."""
        return 0.0

    def total(self, tables: Tables, on: Tensor) -> Tensor:
        """Cost of the slimmed network under a flat pattern: 0-dim float64 on its device."""
        n_in, n_out = tables.channels(on, tables.needs(on)[1])
        return self.layers(torch.arange(len(n_in), device=on.device), n_in, n_out).sum() + self.rest(on)

    def marginal(self, tables: Tables, on: Tensor) -> Tensor:
        """What every mask entry alone adds under a flat pattern: ``(N,)`` float64."""
        readers, needed = tables.needs(on)
        n_in, n_out = tables.channels(on, needed)
        every = torch.arange(len(n_in), device=on.device)
        d_in = self.smooth(every, n_in, n_out) - self.smooth(every, n_in - 1, n_out)
        # What each reader set's channels cost the layers that compute them: with them less without them.
        row, weight = tables.set_row, tables.set_weight
        without = n_out[row] - weight * needed[tables.set_of]
        price = self.smooth(row, n_in[row], without + weight) - self.smooth(row, n_in[row], without)
        d_need = on.new_zeros(tables.n_sets).index_add_(0, tables.set_of, price)
        # A reader matters to a channel only where no other reader keeps it.
        alone = (readers[tables.pair_set] - on[tables.pair_entry]) == 0
        d_on = torch.zeros_like(on).index_add_(0, tables.in_entry, d_in[tables.in_row])
        return d_on.index_add_(0, tables.pair_entry, d_need[tables.pair_set] * alone)


class MacCost(Cost):
    """Multiply-accumulates, exact: ``pair * n_in * n_out + inp * n_in`` a layer that computes anything, and ``fixed``
    (see :class:`mmitp.pruning.tables.Tables`)."""

    what, unit = "operations", "MACs"

    def bind(self, budget: MacBudget, model: nn.Module) -> None:
        self._tables = budget.tables

    def layers(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        t = self._tables(row.device)
        return n_in * (t.pair[row] * n_out + t.inp[row] * (n_out > 0)) + t.fixed[row]


class CostRatio(torch.autograd.Function):
    """The part of a cost that is kept; the gradient is the marginal saving of every channel."""

    @staticmethod
    def forward(ctx: Any, masks: Tensor, on: Tensor, live: Tensor, tables: Tables, cost: Cost, dense: int) -> Tensor:
        ctx.save_for_backward(masks, on, live)
        ctx.tables, ctx.cost, ctx.dense = tables, cost, dense
        return cost.total(tables, on) / dense

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        masks, on, live = ctx.saved_tensors
        marginal = ctx.cost.marginal(ctx.tables, on) * live * (grads[0] / ctx.dense)
        return marginal.to(masks.dtype) * ste_derivative(masks), None, None, None, None, None


class ParameterCost(Cost):
    """Parameters of the slimmed network, exact: weights, biases, offset convolutions, norms, and the rest of the model.

    The gradient leaves the norms out: which channels a tensor keeps is no sum over layers.
    """

    what = unit = "parameters"

    def bind(self, budget: MacBudget, model: nn.Module) -> None:
        self.budget = budget
        rows = [
            self._coefficients(r, e is not None) for r, e in zip(budget.layers, budget.needs.layer_entries, strict=True)
        ]
        # (layers, 4) float64: the coefficients of every layer
        self._rows = {torch.device("cpu"): torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)}
        self.norms: list[tuple[Tensor, int]] = []
        # What is held, or shared, stays whole and is counted with the rest, where every parameter counts once.
        shared = shared_parameters(model)
        counted = {
            id(p) for record in budget.layers if record.module and not record.held for p in record.module.parameters()
        }
        for norm, calls in budget.graph.norms.items():
            if any(id(p) in shared for p in norm.parameters()):
                continue
            if calls[0] is not None and not (isinstance(norm, nn.PReLU) and norm.num_parameters == 1):
                self.norms.append((calls[0], _numel(norm) // len(calls[0])))
                counted |= {id(p) for p in norm.parameters()}
        self.other = sum(p.numel() for _, p in weights_of(model) if id(p) not in counted)
        # (n_nodes,) float64: parameters of norms that each node's channel comes with
        by_node = torch.zeros(budget.graph.n_nodes, dtype=torch.float64)
        for nodes, each in self.norms:
            by_node.index_add_(0, nodes, torch.full((len(nodes),), float(each), dtype=torch.float64))
        self._by_node = {torch.device("cpu"): by_node}

    @staticmethod
    def _coefficients(record: LayerRecord, masked: bool) -> tuple[float, float, float, float]:
        """``a + b n_in + c n_out + d n_in n_out`` parameters, from the layer cut to none and to one channel."""
        layer, kind, groups = record.module, record.kind, record.groups
        if layer is None or kind is None or record.held:
            return 0.0, 0.0, 0.0, 0.0  # a functional call, whose parameters are no layer's, or all of it stays
        if kind.whole(layer) or masked and not channel_masked(record):
            return float(_numel(layer)), 0.0, 0.0, 0.0
        if groups > 1:
            n_in, n_out = record.n_in // groups, record.n_out // groups
            none = _numel_cut(layer, kind, 0, 0)
            return none, 0.0, (_numel_cut(layer, kind, n_in, n_out) - none) / n_out, 0.0
        a = _numel_cut(layer, kind, 0, 0)
        b, c = _numel_cut(layer, kind, 1, 0) - a, _numel_cut(layer, kind, 0, 1) - a
        return a, b, c, _numel_cut(layer, kind, 1, 1) - a - b - c

    def layers(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        if row.device not in self._rows:
            self._rows[row.device] = self._rows[torch.device("cpu")].to(row.device)
        a, b, c, d = self._rows[row.device][row].unbind(1)
        return a + b * n_in + c * n_out + d * n_in * n_out

    def of_restricted(self, budget: MacBudget) -> Cost:
        small = copy.copy(self)
        small.budget = budget
        return small

    def rest(self, on: Tensor) -> Tensor:
        if on.device not in self._by_node:
            self._by_node[on.device] = self._by_node[torch.device("cpu")].to(on.device)
        return (self.budget.kept(self.budget.needed_nodes(on)) * self._by_node[on.device]).sum() + self.other


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for _, p in weights_of(module))


def _numel_cut(layer: nn.Module, kind: Conv2dKind, n_in: int, n_out: int) -> float:
    small = copy.deepcopy(layer)
    device = next(layer.parameters()).device
    kind.slice(small, torch.arange(n_in, device=device), torch.arange(n_out, device=device))
    return float(_numel(small))


def make_cost(cost: str | Mapping[str, Any] | Cost) -> Cost | None:
    """A cost from a config: ``'macs'`` (None), ``'params'``, or ``dict(type='latency', table=..., margin=0.1)``.

    Raises:
        ValueError: none of these.
    """
    if isinstance(cost, Cost):
        return cost
    settings = dict(cost) if isinstance(cost, Mapping) else dict(type=cost)
    kind = settings.pop("type", None)
    if kind == "macs" and not settings:
        return None
    if kind == "params" and not settings:
        return ParameterCost()
    if kind == "latency" and "table" in settings and set(settings) <= {"table", "margin"}:
        from .latency import LatencyCost  # it builds on the budget, which builds on this module

        return LatencyCost(**settings)
    raise ValueError(f"cost must be 'macs', 'params' or dict(type='latency', table='table.json'), got {cost!r}")
