"""What a budget may count besides MACs: parameters, or the latency measured on the machine at hand.

A cost is a function of how many channels every layer reads and computes, plus what the rest of the network takes. MACs
are the default and live in :mod:`mmitp.pruning.budget`; S2 names measured latency as the next step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .graph import shared_parameters
from .latency_table import check_latency_table, read_latency_table
from .layers import Conv2dKind
from .masks import weights_of
from .needs import channel_masked

if TYPE_CHECKING:
    from .budget import MacBudget, _Tables
    from .graph import LayerRecord

_FREE: dict[str, Any] = dict(inputs=[1], outputs=[1], ns=[[0.0]], gather=0.0, scatter=0.0, element=0.0)


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

    def layers(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        """Cost of the layers ``row`` (indices) with so many channels read and computed; all of one shape."""
        raise NotImplementedError

    def smooth(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        """:meth:`layers` without its jumps: the differences of this one are the gradient."""
        return self.layers(row, n_in, n_out)

    def rest(self, on: Tensor) -> Tensor | float:
        """What the network costs besides, under a flat pattern; 0-dim if it is a tensor."""
        return 0.0

    def total(self, tables: _Tables, on: Tensor) -> Tensor:
        """Cost of the slimmed network under a flat pattern (float64): 0-dim, on its device."""
        _, needed = tables.needs(on)
        n_in, n_out = tables.channels(on, needed)
        row = torch.arange(len(n_in), device=on.device)
        return self.layers(row, n_in, n_out).sum() + self.rest(on)

    def marginal(self, tables: _Tables, on: Tensor) -> Tensor:
        """What every mask entry alone adds under a flat pattern, as :meth:`_Tables.marginal` has it of MACs."""
        t = tables
        readers, needed = t.needs(on)
        n_in, n_out = t.channels(on, needed)
        every = torch.arange(len(n_in), device=on.device)
        d_in = self.smooth(every, n_in, n_out) - self.smooth(every, n_in - 1, n_out)
        # What each class of channels costs the layers that compute it: with it less without it.
        row, weight = t.class_row, t.class_weight
        without = n_out[row] - weight * needed[t.class_of]
        price = self.smooth(row, n_in[row], without + weight) - self.smooth(row, n_in[row], without)
        d_need = on.new_zeros(t.n_classes).index_add_(0, t.class_of, price)
        return t.marginal_from(on, readers, d_in, d_need)


class ParameterCost(Cost):
    """Parameters of the slimmed network, exact: weights, biases, offset convolutions, norms, and the rest of the model.

    The gradient leaves the norms out: which channels a tensor carries is no sum over layers.
    """

    what = unit = "parameters"

    def bind(self, budget: MacBudget, model: nn.Module) -> None:
        self.budget = budget
        rows = [self._coefficients(r, s) for r, s in zip(budget.layers, budget.needs.literal_start, strict=True)]
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
    def _coefficients(record: LayerRecord, start: int) -> tuple[float, float, float, float]:
        """``a + b n_in + c n_out + d n_in n_out`` parameters, from the layer cut to none and to one channel."""
        layer, kind, groups = record.module, record.kind, record.groups
        if layer is None or kind is None or record.held:
            return 0.0, 0.0, 0.0, 0.0  # a functional call, whose parameters are no layer's, or all of it stays
        if kind.whole(layer) or start >= 0 and not channel_masked(record):
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

    def rest(self, on: Tensor) -> Tensor:
        if on.device not in self._by_node:
            self._by_node[on.device] = self._by_node[torch.device("cpu")].to(on.device)
        return (self.budget.carried(self.budget.needed_nodes(on)) * self._by_node[on.device]).sum() + self.other


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for _, p in weights_of(module))


def _numel_cut(layer: nn.Module, kind: Conv2dKind, n_in: int, n_out: int) -> float:
    small = copy.deepcopy(layer)
    device = next(layer.parameters()).device
    kind.slice(small, torch.arange(n_in, device=device), torch.arange(n_out, device=device))
    return float(_numel(small))


class LatencyCost(Cost):
    """Measured latency in nanoseconds: every layer's table, interpolated between the measured channel numbers.

    Args:
        table: what :func:`mmitp.pruning.latency.measure_latency` returned, or the path of it as JSON
            (``tools/profile_latency.py`` writes one).
        margin: part of the predicted saving that is not counted on, so that a network at its target by the table, which
            is some per cent off, is at it by the clock too. It stands until the clock itself is asked
            (:class:`mmitp.pruning.calibration.Calibration`).

    Attributes:
        counted: part of the predicted saving that is counted.

    Raises:
        ValueError: the file is no such table, or the margin is not in [0, 1); when bound to a budget: the table is of
            another network or input size.
    """

    what, unit = "latency", "ns"

    def __init__(self, table: str | Mapping[str, Any], margin: float = 0.1) -> None:
        if not 0 <= margin < 1:
            raise ValueError(f"the margin of a latency cost must be in [0, 1), got {margin}")
        self.source = table if isinstance(table, str) else "the latency table"
        self.table: Mapping[str, Any] = read_latency_table(table) if isinstance(table, str) else table
        check_latency_table(self.table, self.source)
        self._vectors: dict[torch.device, dict[str, Tensor]] = {}
        self.margin, self.counted, self.constant = margin, 1 - margin, float(self.table["constant"])

    def bind(self, budget: MacBudget, model: nn.Module) -> None:
        entries = []
        for record in budget.layers:
            entry = self.table["layers"].get(record.name)
            if entry is None and (record.module is None or not record.pair_macs):
                entry = _FREE  # a function, measured with the rest of the network; or it runs at other sizes only
            found = None if entry in (None, _FREE) else [entry["n_in"], entry["n_out"], entry["pair_macs"]]
            here = [record.n_in, record.n_out, record.pair_macs]
            # A table of a batch serves a budget stated for one image too.
            of_batch = [*here[:2], record.pair_macs * self.table.get("batch", 1)]
            if entry is not _FREE and found not in (here, of_batch):
                raise ValueError(
                    f"{self.source} does not fit layer {record.name!r} (inputs, outputs, MACs a pair): here {here}, "
                    f"there {found}. It is of another network or input size: measure again (tools/profile_latency.py), "
                    f"or state the budget for its size, {self.table.get('shape')}"
                )
            entries.append(entry)
        size = max(max(len(e["inputs"]), len(e["outputs"]), 2) for e in entries)

        def padded(values: list[float]) -> list[float]:
            return [float(v) for v in values] + [float(values[-1])] * (size - len(values))

        grid = [[padded(line) for line in e["ns"]] for e in entries]
        vectors = dict(
            inputs=[padded(e["inputs"]) for e in entries],
            outputs=[padded(e["outputs"]) for e in entries],
            ns=[lines + [lines[-1]] * (size - len(lines)) for lines in grid],
            full_in=[e["inputs"][-1] for e in entries],
            full_out=[e["outputs"][-1] for e in entries],
            gather=[e["gather"] for e in entries],
            scatter=[e["scatter"] for e in entries],
            element=[e["element"] for e in entries],
        )
        # float64; inputs and outputs (layers, size), ns (layers, size, size), the others (layers,)
        cpu = {key: torch.tensor(value, dtype=torch.float64) for key, value in vectors.items()}
        cpu["counted"] = torch.tensor(self.counted, dtype=torch.float64)
        self._vectors = {torch.device("cpu"): cpu}
        self._tables = budget.tables(torch.device("cpu"))
        self.dense = self._all_counted(torch.ones(budget.n_literals))

    @property
    def counted(self) -> float:
        return self._counted

    @counted.setter
    def counted(self, value: float) -> None:
        # In place: a captured step goes on with the new value.
        self._counted = float(value)
        for vectors in self._vectors.values():
            vectors["counted"].fill_(self._counted)

    @property
    def calibrated(self) -> bool:
        """Whether the clock has told what to count, and no longer the margin."""
        return self.counted != 1 - self.margin

    def by_table(self, pattern: Tensor) -> float:
        """Latency under a flat pattern as part of the dense one, all of the predicted saving counted."""
        return self._all_counted(pattern) / self.dense

    def _all_counted(self, pattern: Tensor) -> float:
        on = pattern.cpu().double()
        n_in, n_out = self._tables.channels(on, self._tables.needs(on)[1])
        row = torch.arange(len(n_in))
        times = self._time(row, n_in, n_out) - self._whole(row, n_in, n_out) * (n_out > 0)
        return float(times.sum()) + self.constant

    def calibrate(self, table: float, clock: float) -> None:
        """Makes a network cost what the clock says, and every other in proportion: ``1 - counted * (1 - by_table)``.

        Args:
            table: its :meth:`by_table`, below 1.
            clock: its measured latency as part of the dense one.
        """
        assert table < 1, "a network without a predicted saving tells nothing about savings"
        self.counted = (1 - clock) / (1 - table)

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._vectors:
            cpu = self._vectors[torch.device("cpu")]
            self._vectors[device] = {key: value.to(device) for key, value in cpu.items()}
        return self._vectors[device]

    def _time(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        v = self._on(row.device)
        i, part_in = _segment(v["inputs"][row], n_in)
        o, part_out = _segment(v["outputs"][row], n_out)
        grid = v["ns"][row]
        every = torch.arange(len(row), device=row.device)
        low = grid[every, i - 1, o - 1] * (1 - part_out) + grid[every, i - 1, o] * part_out
        high = grid[every, i, o - 1] * (1 - part_out) + grid[every, i, o] * part_out
        # A layer that computes nothing is not run.
        return (low * (1 - part_in) + high * part_in) * (n_out > 0) + v["element"][row] * n_out

    def _whole(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        """What a layer is faster by where it needs no gather or scatter."""
        v = self._on(row.device)
        return v["gather"][row] * (n_in >= v["full_in"][row]) + v["scatter"][row] * (n_out >= v["full_out"][row])

    def smooth(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        return self._on(row.device)["counted"] * self._time(row, n_in, n_out)

    def layers(self, row: Tensor, n_in: Tensor, n_out: Tensor) -> Tensor:
        counted = self._on(row.device)["counted"]
        return self.smooth(row, n_in, n_out) - counted * self._whole(row, n_in, n_out) * (n_out > 0)

    def rest(self, on: Tensor) -> Tensor:
        counted = self._on(on.device)["counted"]
        return counted * self.constant + (1 - counted) * self.dense


def _segment(axis: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Upper end of the segment of each row's axis that ``n`` lies on, and where on it: 0 to 1."""
    n = torch.minimum(torch.maximum(n, axis[:, 0]), axis[:, -1])
    upper = (axis < n[:, None]).sum(1).clamp(min=1)
    every = torch.arange(len(n), device=n.device)
    left, right = axis[every, upper - 1], axis[every, upper]
    return upper, (n - left) / (right - left).clamp(min=1)


def make_cost(cost: str | Mapping[str, Any] | Cost) -> Cost | None:
    """A cost from a config: ``'macs'`` (None), ``'params'``, or ``dict(type='latency', table=..., margin=0.1)``.

    Raises:
        ValueError: none of these.
    """
    if isinstance(cost, Cost):
        return cost
    settings = dict(type=cost) if isinstance(cost, str) else dict(cost)
    kind = settings.pop("type", None)
    if kind == "macs" and not settings:
        return None
    if kind == "params" and not settings:
        return ParameterCost()
    if kind == "latency" and "table" in settings and set(settings) <= {"table", "margin"}:
        return LatencyCost(**settings)
    raise ValueError(f"cost must be 'macs', 'params' or dict(type='latency', table='table.json'), got {cost!r}")
