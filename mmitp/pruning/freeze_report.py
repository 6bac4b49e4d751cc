"""What the freeze did, in figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .budget import LayerRow, MacBudget
from .freeze import Projection
from .layers import masked_layers
from .report import parameter_counts


class Clock(Protocol):
    """What holds a latency budget to the clock, see :class:`mmitp.pruning.latency.Calibration`."""

    clock: float
    table: float

    def observe(self) -> bool: ...

    def project(self, fill: bool = False, masks: Tensor | None = None) -> Projection: ...


@dataclass
class FreezeReport:
    """What :meth:`InTrainPruner.freeze` did; :meth:`to_dict` is JSON-able.

    Attributes:
        target: ``psi*``.
        ratio: part of the cost kept under the frozen masks, not above the target unless ``on_miss='warn'``.
        ratio_before: part kept under the masks as they were trained.
        cost, unit: what ``ratio`` is about (``'operations'``, ``'MACs'``).
        cost_dense, cost_kept: in the unit.
        macs_dense, macs_kept: multiply-accumulates for the example.
        params_dense, params_kept: parameters, as the slimmed network has them.
        granularity: ``'channel'`` or ``'weight'``.
        switched_off, switched_on: masks changed by the freeze, to meet the target and to fill it.
        by_clock, by_table: latency as part of the dense one's, where it is the cost and was measured.
        layers: a row a layer.
    """

    target: float
    ratio: float
    ratio_before: float
    cost: str
    unit: str
    cost_dense: int
    cost_kept: int
    macs_dense: int
    macs_kept: int
    params_dense: int
    params_kept: int
    granularity: str
    switched_off: int
    switched_on: int
    by_clock: float | None
    by_table: float | None
    layers: list[LayerRow]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "layers": [row._asdict() for row in self.layers]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> FreezeReport:
        """The report of a :meth:`to_dict`."""
        return FreezeReport(**{**values, "layers": [LayerRow(**row) for row in values["layers"]]})


def freeze_report(
    model: nn.Module,
    budget: MacBudget,
    target: float,
    before: float,
    switched_off: int,
    switched_on: int,
    clock: Clock | None = None,
) -> FreezeReport:
    """The figures under the masks' present patterns.

    Args:
        model: the masked model.
        budget: its budget.
        target, before, switched_off, switched_on: see :class:`FreezeReport`; ``before`` is its ``ratio_before``.
        clock: what the latency was measured by, where it is the cost.
    """
    params_dense, params_kept = parameter_counts(model, budget)
    kept = budget.kept_cost()
    weights = any(layer.mask_granularity == "weight" for layer in masked_layers(model).values())
    return FreezeReport(
        target=target,
        ratio=kept / budget.dense_cost,
        ratio_before=before,
        cost=budget.what,
        unit=budget.unit,
        cost_dense=budget.dense_cost,
        cost_kept=kept,
        macs_dense=budget.dense_macs,
        macs_kept=budget.kept_macs(),
        params_dense=params_dense,
        params_kept=params_kept,
        granularity="weight" if weights else "channel",
        switched_off=switched_off,
        switched_on=switched_on,
        by_clock=clock.clock if clock is not None else None,
        by_table=clock.table if clock is not None else None,
        layers=budget.table(),
    )
