"""What Optimizer 2 decides on the device is what plain Python decides, value by value and mask by mask."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from small_chain import COSTS, chain

from mmitp.pruning import InTrainPruner, MacBudget, mask_model
from mmitp.pruning.freeze import FILL_TOLERANCE, cost_limit
from mmitp.pruning.masks import SIDE, ste_derivative
from mmitp.pruning.pressure import HYSTERESIS, LEAST_SIGNIFICANCE, MEMORY, balanced, path

TARGET, LR = 0.4, 0.05


class OnTheHost:
    """Optimizer 2 with branches, a search one by one, and derivatives by autograd."""

    def __init__(self, budget: MacBudget, b: Any, steps: int, floor: list[int]) -> None:
        self.budget, self.b, self.steps, self.floor = budget, b, steps, floor
        self.rows = budget.tables(torch.device("cpu")).entry_row
        self.square = torch.zeros(budget.n_entries)
        self.pushed, self.was_on = 0.0, torch.ones(budget.n_entries, dtype=torch.bool)

    def step(self, number: int, task: Tensor) -> Tensor:
        """The masks after a step, from those that the model has."""
        masks = self.budget.flat_masks().detach()
        if self.b != "auto":
            layers = [layer.prune_mask for _, layer in self.budget.masked]
            push = torch.cat(torch.autograd.grad(self.budget.hw_loss(TARGET), layers))
            return self.floored(masks - LR * task - LR * self.b * push)
        masks = masks - LR * task
        self.square = self.square.lerp((task / ste_derivative(masks).clamp(min=1e-3)).square(), 1 - MEMORY)
        return self.floored(self.followed(number, masks))

    def highest(self, masks: Tensor) -> Tensor:
        chosen = torch.zeros_like(self.was_on)
        for row in self.rows.unique().tolist():
            mine = (self.rows == row).nonzero().flatten()
            best = sorted(mine.tolist(), key=lambda i: (-float(masks[i]), i))
            chosen[best[: self.floor[row]]] = True
        return chosen

    def floored(self, masks: Tensor) -> Tensor:
        return torch.where(self.highest(masks) & (masks <= 0), SIDE / (1 - masks), masks)

    def followed(self, number: int, masks: Tensor) -> Tensor:
        with torch.no_grad():
            for layer, part in zip(self.budget.masked, self.budget.split(masks).values(), strict=True):
                layer[1].prune_mask.copy_(part)
        root, worth = self.square.sqrt(), torch.ones(len(masks))
        for row in self.rows.unique():
            worth[self.rows == row] = root[self.rows == row] / root[self.rows == row].mean().clamp(min=1e-30)
        push = balanced(self.budget, self.budget.marginal_costs()) / worth.clamp(min=LEAST_SIGNIFICANCE)
        on = self.budget.binarize(masks)
        returned = on & ~self.was_on & (masks > 0)
        masks = torch.where(returned, masks + self.pushed * push, masks)
        wanted = cost_limit(self.budget, path((number + 1) / (0.7 * self.steps), TARGET))
        limit = cost_limit(self.budget, TARGET)
        if self.budget.cost_of(on) > wanted:
            reach = torch.where(push > 0, masks / push.clamp(min=1e-30), torch.inf)
            stays = self.highest(torch.where(on, reach, -torch.inf)) | (push <= 0)
            now = on.clone()
            for i in reach.argsort(stable=True).tolist():
                if on[i] and not stays[i] and self.budget.cost_of(now) > wanted:
                    now[i], masks[i] = False, -HYSTERESIS
                    self.pushed = max(self.pushed, float(reach[i]))
        elif self.budget.cost_of(on) < (1 - FILL_TOLERANCE) * limit:
            now = on.clone()
            for i in masks.argsort(descending=True, stable=True).tolist():
                if not on[i]:
                    now[i] = True
                    if self.budget.cost_of(now) > limit:
                        break
                    masks[i] = HYSTERESIS
        self.was_on = self.budget.binarize(masks)
        return masks


@pytest.mark.parametrize("cost", ["macs", "latency", "params"])
@pytest.mark.parametrize("b", [60.0, "auto"])
def test_decisions_are_those_of_plain_python(b: Any, cost: str) -> None:
    """Decay drops masks too, so that the path has to put some back, and floors hold others."""
    steps = 40
    model = mask_model(chain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    pruner = InTrainPruner(
        model, torch.zeros(1, 3, 12, 12), TARGET, b=b, lr=LR, steps=steps, cost=COSTS[cost](), min_keep=0.25
    )
    budget = pruner.budget
    host = OnTheHost(budget, b, steps, pruner.floor.tolist())
    pruner.active = True
    generator = torch.Generator().manual_seed(1)
    patterns = []
    for number in range(steps):
        optimizer.zero_grad()
        out = model(torch.randn(4, 3, 12, 12, generator=generator)).mean((2, 3))
        (out - torch.arange(4.0)).square().mean().backward()
        task = torch.cat([layer.prune_mask.grad.clone() for _, layer in budget.masked])
        pruner.take_gradients(optimizer)
        optimizer.step()
        before = [layer.prune_mask.detach().clone() for _, layer in budget.masked]
        expected = host.step(number, task)
        with torch.no_grad():
            for (_, layer), mask in zip(budget.masked, before, strict=True):
                layer.prune_mask.copy_(mask)
        pruner.step()
        found = budget.flat_masks().detach()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        patterns.append(budget.binarize(found))
        assert torch.equal(patterns[-1], budget.binarize(expected))
    changes = [a & ~b for a, b in zip(patterns, patterns[1:], strict=False)]
    assert sum(int(c.sum()) for c in changes) >= 6
    if b == "auto":
        assert float(pruner.path.push) == pytest.approx(host.pushed)  # type: ignore[union-attr]
        assert pruner.ratio() <= TARGET
