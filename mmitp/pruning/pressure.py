"""How hard Optimizer 2 pushes, and when the target will be reached.

Optimizer 2 descends ``L_task + b * L_HW`` on the masks alone by SGD (S2). A fixed ``b`` is the paper's; whether it
arrives depends on the number of channels and the length of the window. So the forecast looks at the *distance*: the
value of the highest mask that would have to go for the ratio to be on target now. It shrinks under every force on the
masks (the push, weight decay, the task gradient, whatever the optimizer makes of it), long before the ratio itself
moves. ``b='auto'`` is a path that the ratio follows down to the target, and at every step the least push that keeps it
there (:class:`PathFollower`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .budget import MacBudget
from .freeze import FILL_TOLERANCE, cost_limit, highest, project
from .masks import ste_derivative

#: A mask that :class:`PathFollower` takes across zero ends so far on the other side (in units of ``M``): it has to
#: travel that far on its own account before it is back. That stops masks from chattering about zero.
HYSTERESIS = 0.05

#: :class:`PathFollower` looks at the ratio so many times in a long window, and at every step of a short one.
LOOKS = 400

#: Memory of the mean square of the task gradient, as the part of it that a step keeps.
MEMORY = 0.99

#: A mask's task gradient counts for at least this part of its layer's mean: dead channels are not sold for nothing.
LEAST_SIGNIFICANCE = 0.1

#: The same over the whole network, where it only keeps the order of what it is divided by.
LEAST_FISHER = 1e-4


def distance(budget: MacBudget, target: float, masks: Tensor | None = None) -> float:
    """How far the masks still have to travel (in units of ``M``) to a ratio of ``target``; 0 when it is reached.

    ``masks``: flat vector in place of the model's masks, on the CPU.
    """
    return max(project(budget, target, masks=masks).threshold, 0.0)


def path(progress: float, target: float) -> float:
    """The ratio ``b='auto'`` steers for: a half cosine from 1 (``progress`` 0) down to ``target`` (``progress`` 1)."""
    s = min(max(progress, 0.0), 1.0)
    return target + (1 - target) * 0.5 * (1 + math.cos(math.pi * s))


def push_speed(budget: MacBudget, gradient: Tensor, reach: float, masks: Tensor | None = None) -> float:
    """Mean of ``dratio/dM`` over the kept masks up to ``reach``: how far a unit of ``lr * b`` moves the next to go.

    ``masks``: flat vector in place of the model's masks, where the gradient is.
    """
    masks = budget.flat_masks().detach() if masks is None else masks
    near = (masks > 0) & (masks <= reach) & (gradient > 0)
    chosen = gradient[near] if bool(near.any()) else gradient[gradient > 0]
    return float(chosen.mean()) if chosen.numel() else 0.0


def task_gradient(budget: MacBudget) -> Tensor:
    """Flat ``dL_task/dM`` as the last backward pass (and :meth:`MacBudget.tie_gradients`) left it; zero where there is
    none."""
    masks = [layer.prune_mask for _, layer in budget.masked]
    flat = torch.cat([(torch.zeros_like(m) if m.grad is None else m.grad).reshape(-1) for m in masks])
    copies = budget.copies(flat.device)
    return flat if copies is None else flat[copies.first]


@torch.no_grad()
def descend(budget: MacBudget, gradient: Tensor, rate: float) -> None:
    """``M <- M - rate * gradient`` for all masks at once: Optimizer 2's SGD without momentum (S2)."""
    masks: list[Tensor] = [layer.prune_mask for _, layer in budget.masked]
    torch._foreach_add_(masks, list(budget.split(gradient).values()), alpha=-rate)


@torch.no_grad()
def set_masks(budget: MacBudget, flat: Tensor) -> None:
    """Gives all counting masks the values of a flat vector."""
    masks: list[Tensor] = [layer.prune_mask for _, layer in budget.masked]
    torch._foreach_copy_(masks, list(budget.split(flat).values()))


def balanced(budget: MacBudget, gradient: Tensor, on: Tensor | None = None) -> Tensor:
    """A gradient of the ratio with every layer's push in proportion to the part of its channels it still keeps (ours).

    The plain gradient weighs a channel by what it costs. In DLA-34 at 384x1280 an input channel of a 3x3 convolution
    costs 32 times as much at full resolution (16 * 9 * 384 * 1280 MACs) as at the deepest level (512 * 9 * 12 * 40), so
    the costly layers are emptied to a single channel, one after the other, before the others lose any. In a residual
    block the inner convolution pays for both layers, and blocks collapse to width one. Here each layer's mean push over
    its kept channels is its kept fraction: layers thin out together, and the task gradient decides which of their
    channels go. Within a layer the weights of the gradient stay, a channel that frees its producers counting for more.

    Where a layer reads several tensors one behind the other (a concatenation), each of them is balanced by itself.
    Their channels may cost very different amounts: in a tree of DLA the root alone reads the last block's output, and
    frees a 3x3 convolution with it; the first block's has other readers. The root would drop nearly all of the last
    block.

    Args:
        budget: the model's budget.
        gradient: flat ``dratio/dM`` or ``dratio/dM_b``.
        on: flat bool pattern in place of the one in force, on the gradient's device.
    """
    tables = budget.tables(gradient.device)
    source, n = tables.entry_source, len(tables.source_count)
    on = (budget.flat_pattern() if on is None else on).to(gradient.dtype)
    size = tables.source_count.to(gradient.dtype)  # of the dense network: a cut changes nobody's part
    kept = gradient.new_zeros(n).index_add_(0, source, on)
    total = gradient.new_zeros(n).index_add_(0, source, gradient * on)
    # mean push wanted: kept / size; mean push there is: total / kept
    scale = torch.where(total > 0, kept.square() / (size * total).clamp(min=1e-30), torch.zeros_like(total))
    return gradient * scale[source]


def as_strong(gradient: Tensor, like: Tensor) -> Tensor:
    """A push scaled to the sum of another one over all masks, so that one ``b`` means the same for both."""
    return gradient * (like.sum() / gradient.sum().clamp(min=1e-30))


class Significance:
    """How much the loss depends on each mask: root of the mean square of ``dL_task/dM_b`` over the steps seen (ours).

    The signed gradient averages out over a long time, whatever a channel is worth (its weights are near their optimum);
    its square does not: it is the first-order importance of the pruning literature (Molchanov et al. 2019), and costs
    nothing here, where every step has that gradient.
    """

    def __init__(self) -> None:
        self.mean_square: Tensor | None = None

    def prepare(self, like: Tensor) -> None:
        """Makes the mean square, or moves it, to where the flat masks are."""
        self.mean_square = torch.zeros_like(like) if self.mean_square is None else self.mean_square.to(like.device)

    @torch.no_grad()
    def observe(self, budget: MacBudget, task: Tensor, counts: Tensor | None = None) -> None:
        """Takes in a step's flat ``dL_task/dM``; one where ``counts`` (0-dim bool) is False leaves no trace."""
        slope = ste_derivative(budget.flat_masks().detach()).clamp(min=1e-3)
        square = (task / slope).square()
        if self.mean_square is None:
            self.prepare(square)
        assert self.mean_square is not None
        if counts is not None:
            square = torch.where(counts, square, self.mean_square)
        self.mean_square.lerp_(square, 1 - MEMORY)

    def relative(self, budget: MacBudget) -> Tensor | None:
        """The significance of every mask over the mean of its layer, flat; None before the first step."""
        if self.mean_square is None:
            return None
        tables = budget.tables(self.mean_square.device)
        rows, n = tables.entry_row, len(budget.layers)
        root = self.mean_square.sqrt()
        total = root.new_zeros(n).index_add_(0, rows, root)
        size = root.new_zeros(n).index_add_(0, rows, torch.ones_like(root))
        mean = (total / size.clamp(min=1))[rows]
        return torch.where(mean > 0, root / mean.clamp(min=1e-30), torch.ones_like(root)).clamp(min=LEAST_SIGNIFICANCE)

    def fisher(self) -> Tensor | None:
        """The mean square of ``dL_task/dM_b`` over its mean over all masks, flat; None before the first step.

        It is the diagonal of the empirical Fisher information of the masks: to second order, half of it is what the
        loss loses by switching one off (Liu et al., "Group Fisher Pruning", ICML 2021). Losses of one network, so
        layers compare: divided by what each mask costs, the cheapest loss a MAC goes first, wherever it lies.
        """
        if self.mean_square is None:
            return None
        return (self.mean_square / self.mean_square.mean().clamp(min=1e-30)).clamp(min=LEAST_FISHER)

    def keep(self, keep: Tensor) -> None:
        """Forgets the entries not in ``keep`` (flat bool)."""
        if self.mean_square is not None:
            self.mean_square = self.mean_square[keep.to(self.mean_square.device)]

    def state_dict(self) -> dict[str, Any]:
        return dict(mean_square=None if self.mean_square is None else self.mean_square.cpu().clone())

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        square = state["mean_square"]
        self.mean_square = None if square is None else square.to(device, copy=True)


class PathFollower:
    """``b='auto'``: at every step the least push that keeps the ratio on its path (ours; a fixed ``b`` is the paper's).

    A push of weight ``b`` takes ``lr * b * push`` off the masks, and with the slope of the straight-through estimator
    left out (it only says how fast a mask moves) the first to cross zero are those with the lowest ``M / push``. So the
    masks are put in that order, and as many of them cross as it takes to bring the ratio down to its path: one
    bisection, all of it on the device. The others stay where they are, since only the order says what goes next; moving
    all would bring them next to zero, where noise switches them. A mask that its gradients bring back gets what the
    push has taken, and competes again. The path ends at the target, and so does the ratio. What other forces (weight
    decay) drop below the target comes back too, best first.

    Args:
        target: ``psi*``.
        steps: optimizer steps in the pruning window.
        reach: part of the window after which the path arrives at the target.

    Attributes:
        push: the largest ``lr * b`` (in units of ``M`` per unit of push) that any look has needed so far, 0-dim.
        on: flat bool pattern after the last look; None before the first.
    """

    def __init__(self, target: float, steps: int, reach: float = 0.7) -> None:
        self.target = target
        self.arrival = max(reach * steps, 1.0)
        self.every = max(steps // LOOKS, 1)
        self.push = torch.zeros(())
        self.on: Tensor | None = None

    def looks(self, step: int) -> bool:
        """Whether :meth:`hold` is to be called after a step of the window."""
        return step % self.every == 0

    def wanted(self, step: int) -> float:
        """The ratio to be at after a step of the window."""
        return path((step + 1) / self.arrival, self.target)

    @torch.no_grad()
    def hold(self, budget: MacBudget, push: Tensor, step: int, floor: Tensor, worth: Tensor | None = None) -> None:
        """Takes the masks across zero that have to go (or to come back) after step ``step`` of the window.

        Args:
            budget: the model's budget.
            push: flat, what of ``dratio/dM_b`` counts (:func:`balanced`), positive where a mask costs anything.
            step: optimizer steps done since the window began.
            floor: entries that each layer keeps at least, see :func:`mmitp.pruning.freeze.floors`.
            worth: flat significance that the push is divided by, if any. Relative to the layer's mean it does more than
                order the layer's channels: one whose loss depends on few of them loses more than its balanced part.
        """
        if not self.looks(step):
            return
        masks = budget.flat_masks().detach()
        push = push if worth is None else push / worth
        on = budget.binarize(masks)
        self.prepare(masks)
        assert self.on is not None
        returned = on & ~self.on & (masks > 0)
        masks = torch.where(returned, masks + self.push * push, masks)
        wanted, limit = cost_limit(budget, self.wanted(step)), cost_limit(budget, self.target)
        cost = budget.cost_tensor(on).ceil()
        down, up = cost > wanted, cost < (1 - FILL_TOLERANCE) * limit
        up = up & ~down
        reach = torch.where(push > 0, masks / push.clamp(min=1e-30), torch.inf)
        stays = highest(budget, torch.where(on, reach, -torch.inf), floor) | (push <= 0)
        # In order: down, what the least push takes across zero first; up, the highest of those that are off.
        crosses = torch.where(down, on & ~stays, ~on)
        order = torch.where(down, reach, -masks).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = crosses[order].cumsum(0) - 1
        place = torch.where(crosses, place, len(place))

        def holds(k: Tensor) -> Tensor:
            """Down: whether the path is met once the first k are off; up: whether the limit is passed with k on."""
            cost = budget.cost_tensor(torch.where(place < k, ~down, on)).ceil()
            return torch.where(down, cost <= wanted, cost > limit)

        n = crosses.sum()
        k = _fewest(holds, n, len(place))
        first = place < torch.where(down, torch.minimum(k, n), torch.where(up, k - 1, 0))
        self.push.copy_(torch.maximum(self.push, torch.where(first & down, reach, 0).amax()))
        side = torch.where(down, masks.new_full((), -HYSTERESIS), masks.new_full((), HYSTERESIS))
        masks = torch.where(first, side, masks)
        set_masks(budget, masks)
        self.on.copy_(budget.binarize(masks))

    def prepare(self, masks: Tensor) -> None:
        """Makes its state, or moves it, to where the flat masks are."""
        self.push = self.push.to(masks)
        # Before the first look nothing has been pushed, so nothing returns.
        self.on = torch.ones_like(masks, dtype=torch.bool) if self.on is None else self.on.to(masks.device)

    def keep(self, keep: Tensor) -> None:
        """Forgets the entries not in ``keep`` (flat bool)."""
        if self.on is not None:
            self.on = self.on[keep.to(self.on.device)]

    def state_dict(self) -> dict[str, Any]:
        return dict(push=float(self.push), on=None if self.on is None else self.on.cpu().clone())

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.push, on = torch.tensor(state["push"], device=device), state["on"]
        self.on = None if on is None else on.to(device, copy=True)


def _fewest(holds: Callable[[Tensor], Tensor], n: Tensor, most: int) -> Tensor:
    """The smallest k in 0..n for which the monotone predicate holds, n + 1 if it never does; nothing is read.

    ``most``: what ``n`` is at most. It fixes the number of rounds, whatever the values are.
    """
    low, high = torch.zeros_like(n), n + 1
    for _ in range((most + 1).bit_length()):
        middle = (low + high) // 2
        found, open_ = holds(middle), low < high
        low, high = torch.where(open_ & ~found, middle + 1, low), torch.where(open_ & found, middle, high)
    return low


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
        self.seen.clear()
        self.seen.extend((int(s), float(d)) for s, d in state["seen"])
