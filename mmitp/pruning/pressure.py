"""How hard Optimizer 2 pushes, and when the target will be reached.

Optimizer 2 descends ``L_task + b * L_HW`` on the masks alone by SGD (S2). A fixed ``b`` is the paper's; whether it
arrives depends on the number of channels and the length of the window. So both the forecast and ``b='auto'`` look at
the *distance*: the value of the highest mask that would have to go for the ratio to be on target now. It shrinks under
every force on the masks (the push, weight decay, the task gradient, whatever the optimizer makes of it), long before
the ratio itself moves.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from .budget import MacBudget
from .freeze import _fewest, _first_maxima, _switched, project

#: ``b='auto'`` aims this far below zero (in units of ``M``): a step in proportion to the distance would never arrive.
MARGIN = 0.01

#: ``b='auto'`` lets a step take the ratio at most this far below its path.
FRONT = 0.05

#: Just before and just after a mask crosses zero, as a part of the step: above float32's rounding.
STEP_RESOLUTION = 1e-6


def distance(budget: MacBudget, target: float) -> float:
    """How far the masks still have to travel (in units of ``M``) to a ratio of ``target``; 0 when it is reached."""
    return max(project(budget, target).threshold, 0.0)


def path(progress: float, target: float) -> float:
    """The ratio ``b='auto'`` steers for: a half cosine from 1 (``progress`` 0) down to ``target`` (``progress`` 1)."""
    s = min(max(progress, 0.0), 1.0)
    return target + (1 - target) * 0.5 * (1 + math.cos(math.pi * s))


def push_speed(budget: MacBudget, gradient: Tensor, reach: float) -> float:
    """Mean of ``dratio/dM`` over the kept masks up to ``reach``: how far a unit of ``lr * b`` moves the next to go."""
    masks = budget.flat_masks().detach()
    near = (masks > 0) & (masks <= reach) & (gradient > 0)
    chosen = gradient[near] if bool(near.any()) else gradient[gradient > 0]
    return float(chosen.mean()) if chosen.numel() else 0.0


def ratio_and_gradient(budget: MacBudget) -> tuple[float, Tensor]:
    """The ratio, and its flat gradient over all counting masks: that of ``L_HW`` while the hinge is open."""
    masks = [layer.prune_mask for _, layer in budget.masked]
    with torch.enable_grad():
        ratio = budget.ratio()
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(ratio, masks)])
    return float(ratio.detach()), gradient


def task_gradient(budget: MacBudget) -> Tensor:
    """Flat ``dL_task/dM`` as the last backward pass left it; zero where there is none."""
    masks = [layer.prune_mask for _, layer in budget.masked]
    return torch.cat([(torch.zeros_like(m) if m.grad is None else m.grad).reshape(-1) for m in masks])


@torch.no_grad()
def descend(budget: MacBudget, gradient: Tensor, rate: float) -> None:
    """``M <- M - rate * gradient`` for all masks at once: Optimizer 2's SGD without momentum (S2)."""
    masks: list[Tensor] = [layer.prune_mask for _, layer in budget.masked]
    torch._foreach_add_(masks, list(budget.split(gradient).values()), alpha=-rate)


def balanced(budget: MacBudget, gradient: Tensor) -> Tensor:
    """``dratio/dM`` with every layer's push in proportion to the part of its channels it still keeps (ours).

    The plain gradient weighs a channel by what it costs. In DLA-34 at 384x1280 an input channel of a 3x3 convolution
    costs 32 times as much at full resolution (16 * 9 * 384 * 1280 MACs) as at the deepest level (512 * 9 * 12 * 40), so
    the costly layers are emptied to a single channel, one after the other, before the others lose any. Here each
    layer's mean push over its kept channels is its kept fraction: layers thin out together, and the task gradient
    decides which of their channels go. Within a layer the weights of the gradient stay, a channel that frees its
    producers counting for more.

    Args:
        budget: the model's budget.
        gradient: flat ``dratio/dM``.
    """
    tables = budget.tables(gradient.device)
    rows, n = tables.literal_row, len(budget.layers)
    on = budget.flat_pattern().to(gradient.dtype)
    size = gradient.new_zeros(n).index_add_(0, rows, torch.ones_like(on))
    kept = gradient.new_zeros(n).index_add_(0, rows, on)
    total = gradient.new_zeros(n).index_add_(0, rows, gradient * on)
    # mean push wanted: kept / size; mean push there is: total / kept
    scale = torch.where(total > 0, kept.square() / (size * total).clamp(min=1e-30), torch.zeros_like(total))
    return gradient * scale[rows]


class AutoPressure:
    """Closed loop for ``b``: the smallest push that keeps the ratio on its path (ours; a fixed ``b`` is the paper's).

    Every update measures the distance to the point of the path one ``horizon`` ahead and sets ``b`` so that Optimizer 2
    alone would cover it in that time; an integral term makes up for forces that act against it.

    Args:
        target: ``psi*``.
        lr: learning rate of Optimizer 2.
        steps: optimizer steps in the pruning window.
        reach: part of the window after which the path arrives at the target.
        horizon: part of the window it looks ahead.
    """

    def __init__(self, target: float, lr: float, steps: int, reach: float = 0.7, horizon: float = 0.05) -> None:
        self.target, self.lr = target, lr
        self.arrival = max(reach * steps, 1.0)
        self.horizon = max(horizon * steps, 1.0)
        self.b = 0.0
        self.integral = 0.0

    def update(self, budget: MacBudget, gradient: Tensor, step: int, elapsed: int) -> float:
        """Measures and returns ``b`` for the coming steps.

        Args:
            budget: the model's budget.
            gradient: flat ``dratio/dM``.
            step: optimizer steps done since the window began.
            elapsed: steps since the last update.
        """
        ratio = float(budget.ratio().detach())
        ahead = path((step + self.horizon) / self.arrival, self.target)
        left = distance(budget, ahead) if ratio > ahead else 0.0
        speed = push_speed(budget, gradient, left)
        if left <= 0 or speed <= 0:
            self.b, self.integral = 0.0, 0.5 * self.integral
        else:
            left += MARGIN
            self.integral += left / self.horizon * elapsed / self.horizon
            self.b = (left / self.horizon + self.integral) / (self.lr * speed)
        return self.b

    def restrain(self, budget: MacBudget, gradient: Tensor, b: float, step: int) -> float:
        """The part of ``b`` that does not take the ratio below its path in this very step.

        Masks that the task hardly tells apart travel as one front and would all cross zero together.
        """
        masks = budget.flat_masks().detach()
        floor = int(path((step + 1) / self.arrival, self.target) * budget.dense_cost)
        push = self.lr * b * gradient

        def cost(part: float) -> int:
            return budget.cost_of(budget.binarize(masks - part * push))

        if cost(1.0) >= floor:
            return b
        # The part of the step at which each mask crosses zero; 2 for those that do not.
        parts = torch.where((masks > 0) & (push > 0), masks / push, 2.0).clamp(max=2.0)
        on = budget.binarize(masks)
        last = _first_maxima(budget, torch.where(on, parts, -1.0))  # a layer never loses its last channel
        crossing = on & (parts <= 1) & ~last
        order = parts.argsort(stable=True)
        order = order[crossing[order]]
        n = _fewest(lambda k: budget.cost_of(_switched(on, order[:k], False)) < floor, len(order))
        if n == 0:
            return 0.0  # below the path already
        if n > len(order):
            return b  # some layer's last channel has changed places with another: no front
        crosses = float(parts[order[n - 1]])
        low, high = max(crosses - STEP_RESOLUTION, 0.0), min(crosses + STEP_RESOLUTION, 1.0)
        # The upper end crosses the path by as little as the front allows; the lower one would never arrive. Masks that
        # nothing tells apart stay above zero: the freeze cuts them to the target.
        return b * (high if cost(high) >= floor - FRONT * budget.dense_cost else low)

    def state_dict(self) -> dict[str, Any]:
        return dict(b=self.b, integral=self.integral)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.b, self.integral = float(state["b"]), float(state["integral"])


class Forecast:
    """Extrapolates the observed distance to the step at which the target will be reached.

    Args:
        memory: number of recent measurements the slope is taken over.
    """

    def __init__(self, memory: int = 8) -> None:
        self.seen: deque[tuple[int, float]] = deque(maxlen=memory)

    def observe(self, step: int, left: float) -> None:
        """Adds a measurement: distance ``left`` after ``step`` steps of the window."""
        self.seen.append((step, left))

    @property
    def speed(self) -> float:
        """Distance covered a step (least squares over the memory); 0 with fewer than three measurements."""
        if len(self.seen) < 3:
            return 0.0
        steps = torch.tensor([s for s, _ in self.seen], dtype=torch.float64)
        left = torch.tensor([d for _, d in self.seen], dtype=torch.float64)
        steps = steps - steps.mean()
        return float(-(steps * (left - left.mean())).sum() / steps.square().sum().clamp(min=1e-12))

    def arrival(self) -> float:
        """The step at which the distance becomes 0 at the present speed; infinite if it does not shrink."""
        step, left = self.seen[-1]
        if left <= 0:
            return step
        return step + left / self.speed if self.speed > 0 else math.inf

    def needed_push(self, b: float, lr: float, speed_of_push: float, steps: int) -> float:
        """The fixed ``b`` that would arrive at ``steps``, everything else going on as observed."""
        step, left = self.seen[-1]
        missing = left / max(steps - step, 1) - self.speed
        return b + max(missing, 0.0) / max(lr * speed_of_push, 1e-30)

    def state_dict(self) -> dict[str, Any]:
        return dict(seen=list(self.seen))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen.extend((int(s), float(d)) for s, d in state["seen"])
