"""Measured latency as a cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmitp.values import is_number

from ..cost import Cost
from .table import check_latency_table, read_latency_table

if TYPE_CHECKING:
    from ..budget import MacBudget

#: Costs are whole numbers that float64 holds exactly.
LONGEST = 2.0**53

_FREE: dict[str, Any] = dict(inputs=[1], outputs=[1], ns=[[0.0]], gather=0.0, scatter=0.0, element=0.0)


class LatencyCost(Cost):
    """Measured latency in nanoseconds: every layer's table, interpolated between the measured channel numbers.

    Args:
        table: what :func:`mmitp.pruning.latency.measure_latency` returned, or the path of it as JSON
            (``mmitp profile`` writes one).
        margin: part of the predicted saving that is not counted on, so that a network at its target by the table, which
            is some per cent off, is at it by the clock too. It stands until the clock itself is asked
            (:class:`mmitp.pruning.latency.Calibration`).

    Attributes:
        counted: part of the predicted saving that is counted.

    Raises:
        ValueError: the file is no such table, or the margin is not in [0, 1); when bound to a budget: the table is of
            another network or input size.
    """

    what, unit = "latency", "ns"

    def __init__(self, table: str | Mapping[str, Any], margin: float = 0.1) -> None:
        if not (is_number(margin, 0) and margin < 1):
            raise ValueError(f"the margin of a latency cost must be in [0, 1), got {margin!r}")
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
                    f"there {found}. It is of another network or input size: measure again (mmitp profile), "
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
        self.dense = self._all_counted(torch.ones(budget.n_entries))
        if not (is_number(self.dense) and 0 < self.dense < LONGEST):
            raise ValueError(
                f"{self.source}: the dense network takes {self.dense:g} ns by it, where a positive time below "
                f"{LONGEST:g} ns (104 days) is expected: measure again (mmitp profile)"
            )

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
