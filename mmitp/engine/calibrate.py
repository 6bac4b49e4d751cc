"""A latency budget held to the clock of the machine that a run is on (:mod:`mmitp.pruning.latency`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import broadcast, is_main_process
from torch import Tensor, nn

from mmitp.engine.surgery import without_runner_hooks
from mmitp.pruning import MacBudget
from mmitp.pruning.latency import Calibration, LatencyCost, clock_ratio, processor


def calibration(
    model: nn.Module,
    example: dict[str, Any],
    budget: MacBudget,
    cost: LatencyCost,
    target: float,
    warn: Callable[[str], None],
    divisor: int | str,
    min_keep: float,
) -> Calibration | None:
    """What compares the table's latency with the clock; None, said by ``warn``, where the table is another machine's.

    Args:
        model: the masked model, not wrapped.
        example: one batch of the table's size.
        budget, target, divisor, min_keep: the pruner's.
        cost: the budget's.
        warn: takes the warning.
    """
    measured_on, here = cost.table.get("machine", "an unknown machine"), processor(cost.table.get("device", "cpu"))
    if not _of_main(lambda: measured_on == here):
        warn(
            f"{cost.source} was measured on {measured_on}, this is {here or 'without such a device'}: "
            f"its times cannot be checked here. The target is met by the table, with {1 - cost.counted:.2g} of the "
            "saving not counted on; benchmark the slimmed network on its own machine"
        )
        return None

    def measure(pattern: Tensor) -> float:
        with without_runner_hooks(model):
            return _of_main(lambda: clock_ratio(model, example, budget, pattern))

    return Calibration(budget, target, measure, divisor, min_keep)


def _of_main(value: Callable[[], float]) -> float:
    """What the main process finds, in all of them: no two clocks agree."""
    found = torch.zeros(1, dtype=torch.float64)
    if is_main_process():
        found[0] = value()
    broadcast(found)
    return float(found)
