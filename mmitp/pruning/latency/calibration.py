"""Holds a latency budget to the clock: what the table predicts is corrected by what slimmed networks really take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..budget import MacBudget
from ..freeze import Projection, lowest_pattern, project
from .cost import LatencyCost

#: The same network measured twice differs by about so much: what is to be at the target later is below it by that now.
SPREAD = 0.01

#: A measurement during training counts once the table predicts this part of the saving wanted: near the dense network
#: the spread would be most of it.
TRUST = 0.5

#: Networks that a freeze measures at most.
ATTEMPTS = 8


class Calibration:
    """A latency budget whose savings count for what the clock finds.

    A table is some per cent off, and where pruning saves little that is a large part of the saving. So the predicted
    saving is scaled until the network at hand costs what it takes by the clock (:meth:`LatencyCost.calibrate`): anew
    whenever the masks have moved on, and in the search for the freeze.

    Args:
        budget: with a :class:`LatencyCost`.
        target: fraction of the dense latency to end at or under.
        measure: latency of the network slimmed to a flat bool pattern as part of the dense one's, see
            :func:`mmitp.pruning.latency.clock_ratio`. Only patterns that the freeze may end at are measured twice.
        divisor, min_keep: of the freeze.

    Attributes:
        table, clock: the last network's latency as part of the dense one's, predicted and measured; 1 before the first.
    """

    def __init__(
        self,
        budget: MacBudget,
        target: float,
        measure: Callable[[Tensor], float],
        divisor: int | str = 1,
        min_keep: float = 0.0,
    ) -> None:
        assert isinstance(budget.cost, LatencyCost)
        self.budget, self.cost, self.target, self.measure = budget, budget.cost, target, measure
        self.divisor, self.min_keep = divisor, min_keep
        self.table = self.clock = 1.0
        self._known: dict[bytes, float] = {}

    def calibrate(self) -> bool:
        """:meth:`observe` as training goes on; False, and nothing done, where the table predicts too little yet.

        However little the clock leaves of a saving, enough of it is counted for the target to stay in reach: whether
        it truly is will be seen at the freeze.
        """
        if 1 - self.cost.by_table(self.budget.flat_pattern()) <= TRUST * (1 - self.target):
            return False
        measured, lowest = self.observe(), self._lowest()
        least, most = (1 - (1 - SPREAD) * self.target) / (1 - lowest), 1 / (1 - lowest)
        self.cost.counted = min(max(self.cost.counted, least), most)
        return measured

    def observe(self) -> bool:
        """Makes the masks' present network cost what it takes by the clock; whether it had to be measured for that."""
        known = len(self._known)
        self._observe(self.budget.flat_pattern().cpu())
        return len(self._known) > known

    def project(self, fill: bool = False, masks: Tensor | None = None) -> Projection:
        """:func:`mmitp.pruning.freeze.project` to the target by the clock.

        Patterns cut to different ratios by the table are measured, with the line between the nearest network above the
        target and the nearest below it telling the next. Ends 1 to 3 % below the target where single channels allow,
        and with the cheapest network (``clock`` above the target) if there is none below. ``ratio`` is the clock's.
        ``masks``: flat vector in place of the model's masks, on the CPU.
        """
        limit, near = (1 - SPREAD) * self.target, (1 - 3 * SPREAD) * self.target
        aim, lowest = (limit + near) / 2, self._lowest()
        above, below = (1.0, 1.0), None
        best: Projection | None = None
        tried: set[bytes] = set()
        wanted = 1 - (1 - aim) / max(self.cost.counted, 1e-9)
        for attempt in range(ATTEMPTS):
            if best is None and attempt == ATTEMPTS - 1:
                wanted = lowest
            self.cost.calibrate(max(wanted, lowest), aim)
            found = project(self.budget, aim, fill, self.divisor, self.min_keep, masks)
            if _key(found.pattern) in tried:
                break
            tried.add(_key(found.pattern))
            table, clock = self._observe(found.pattern)
            if clock <= limit:
                # Of many measurements the lowest is picked: it has to be found again, and the slower one counts.
                self._known[_key(found.pattern)] = max(clock, self.measure(found.pattern))
                clock = self._observe(found.pattern)[1]
            if clock <= limit:
                if below is None or clock > below[1]:
                    best, below = found, (table, clock)
                if clock >= near:
                    break
            elif best is None or table < above[0]:
                above = table, clock
            if below is None:
                # The line from the dense network through this one, but no further than half the way there is.
                saving = (1 - aim) * (1 - table) / max(1 - clock, 1e-9)
                wanted = max(1 - saving, (table + lowest) / 2)
            elif below[0] < above[0]:
                slope = (above[0] - below[0]) / (above[1] - below[1])
                wanted = below[0] + (aim - below[1]) * slope
            else:
                break
        result = best or found
        return replace(result, ratio=self._observe(result.pattern)[1])

    def _observe(self, pattern: Tensor) -> tuple[float, float]:
        """By the table and by the clock."""
        key, table = _key(pattern), self.cost.by_table(pattern)
        if key not in self._known:
            self._known[key] = self.measure(pattern)
        clock = self._known[key]
        if table < 1:
            self.cost.calibrate(table, clock)
        self.table, self.clock = table, clock
        return table, clock

    def _lowest(self) -> float:
        """What the table says of the cheapest network that these masks can be cut to."""
        masks = self.budget.flat_masks().detach().cpu()
        pattern = lowest_pattern(self.budget, masks, self.divisor, self.min_keep)
        # Costs are rounded to whole nanoseconds, after scaling by no less than the saving wanted.
        return self.cost.by_table(pattern) + 2 / (self.budget.dense_cost * (1 - self.target))


def _key(pattern: Tensor) -> bytes:
    return bytes(pattern.to(torch.uint8).tolist())
