"""InTrainPruner: the method as one object that follows the optimizer of any training loop (S2). torch only.

    Optimizer 1 (the user's):  L_task + L_reg              -> W and M
    Optimizer 2 (here):        L_prune = L_task + b * L_HW -> M only, SGD:
                               M <- M - lr * (dL_task/dM + b * dL_HW/dM),   L_HW = max(ratio - psi*, 0)

Optimizer 2 steps after every step of Optimizer 1 while the pruner is active. At the end of the window :meth:`freeze`
fixes the masks at or under the target, and :meth:`slim` cuts off what they drop.

Its step has two halves. :meth:`update` is operations on the device and nothing else: no value is read and no branch
depends on one, so a CUDA graph can hold it. :meth:`advance` counts, and lets ``b='auto'`` look at the ratio some
hundred times in a window. It reads the device some 50 times in a window, the pruner's only waits in training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmitp.values import unlike

from .budget import MacBudget
from .cost import Cost, make_cost
from .device_state import DeviceState
from .freeze import (
    cost_limit,
    floors,
    freeze_masks,
    highest,
    not_finite,
    project,
    require_finite,
    require_reachable,
)
from .freeze_report import Clock, FreezeReport, freeze_report
from .latency import LatencyCost
from .layers import masked_layers
from .live import plan_live, require_channels, require_same_training, shrink_live
from .masks import SIDE, MaskBank, MaskedLayer
from .pressure import (
    Forecast,
    PathFollower,
    Significance,
    as_strong,
    balanced,
    descend,
    distance,
    push_speed,
    set_masks,
    task_gradient,
)
from .progressive import OffTimes, cut_state, entries_to_keep, note_cut, plan_cut, restore_cut
from .settings import (
    OUTCOME,
    bare_optimizer,
    check_budget,
    check_cuts,
    check_settings,
    frozen_otherwise,
    mask_layout,
    require_in_optimizer,
    require_same_layout,
    require_trainable,
)
from .slim import SlimPlan, slim_with_plan

logger = logging.getLogger(__name__)

#: In a long window the pruner reads the device so many times; where its length is not known, every so many steps.
READS = 50
READ_EVERY = 100


class InTrainPruner:
    """Trains the masks of a model down to a budget, beside the training of its weights.

    Args:
        model: with masks (:func:`mmitp.pruning.mask_model`), not wrapped for distributed training.
        example: input of one forward pass, as for :class:`~mmitp.pruning.MacBudget`: the size operations are stated
            for.
        target: ``psi*``, part of the whole model's operations (of the ``cost``) to keep, in (0, 1).
        b: weight of ``L_HW`` (S1: 10; 50 for a target of 0.2), or ``'auto'``: the least push at every step that keeps
            the ratio on a half-cosine path from 1 to ``target`` over the first 70 % of the window
            (:class:`~mmitp.pruning.pressure.PathFollower`); ``lr`` then only weighs the task gradient.
        lr: learning rate of Optimizer 2 (S1: 0.01), SGD without momentum.
        steps: optimizer steps that the window will have; ``'auto'`` and the forecast need it.
        push: direction of ``b * L_HW``: ``'plain'``, the gradient itself (the paper's), or ``'balanced'`` over the
            layers (:func:`~mmitp.pruning.pressure.balanced`). By default plain for a fixed ``b``, balanced for
            ``'auto'``. ``'fisher'``, with ``'auto'`` alone: the plain gradient over what the loss loses by a mask, over
            the whole network (:meth:`~mmitp.pruning.pressure.Significance.fisher`).
        min_keep: part of its input channels that every layer keeps at least, in [0, 1); 0 is one channel (the paper's).
        fill: the freeze switches the best dropped channels back on up to within 1 % of the target.
        divisor: at the freeze every layer keeps a multiple of so many channels, read and computed, or all it has;
            ``'auto'``: 8 from 64 channels on, 4 from 32, 2 from 16, 1 below.
        cost: what ``target`` is a part of: ``'macs'``, ``'params'``, or a :class:`~mmitp.pruning.cost.Cost`.
        on_miss: what :meth:`freeze` does where the trained masks lie above the target: ``'project'`` switches the
            lowest off until it is met, ``'error'`` raises, ``'warn'`` freezes them as they are.
        budget: the model's budget, if there is one already.
        more_examples: inputs of other sizes or batches that the small network has to be right for as well.
        slim_every: progressive slimming: :meth:`cut` may be called between steps of the window, and every so many of
            them cuts out what has been off for as long. None: the network is slimmed at the end alone.
        warn: takes the warnings; by default the module's logger.

    Attributes:
        active: whether Optimizer 2 steps; set it to True for the epochs of the window.
        frozen: whether the masks are fixed.
        position: steps of Optimizer 1 in the window so far.
        budget: the model's budget.
        plan: what the last :meth:`slim` has left of every layer, None before. ``plan.spec()`` is plain numbers, from
            which :func:`~mmitp.pruning.apply_plan` gives a dense model the small network's sizes again
            (``SlimPlan.from_spec``); with the plan itself it slims a copy that has the same masks (an average).

    Raises:
        ValueError: an argument out of range; masks that are missing or do not train; a target that the freeze could not
            meet.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import InTrainPruner, mask_model
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = mask_model(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = InTrainPruner(model, torch.randn(1, 3, 8, 8), target=0.5, steps=20)
        >>> pruner.attach(optimizer)
        >>> pruner.active = True
        >>> for step in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> report = pruner.freeze()
        >>> 0.45 < report.ratio <= 0.5
        True
        >>> small = pruner.slim()
        >>> report.macs_kept < report.macs_dense // 2 + 1
        True
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        target: float,
        b: float | str = "auto",
        lr: float = 0.01,
        steps: int | None = None,
        push: str | None = None,
        min_keep: float = 0.1,
        fill: bool = True,
        divisor: int | str = 1,
        cost: str | Mapping[str, Any] | Cost = "macs",
        on_miss: str = "project",
        budget: MacBudget | None = None,
        more_examples: Sequence[Any] = (),
        slim_every: int | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        check_settings(target, b, lr, steps, push, min_keep, divisor, on_miss)
        self.model, self.example = model, example
        self.plan: SlimPlan | None = None
        self._slimmed: FreezeReport | None = None  # the last report, once the live model has no masks
        self._optimizer: torch.optim.Optimizer | None = None  # the one followed
        self.target, self.b, self.lr, self.steps = float(target), b, float(lr), steps
        self.push = push or ("balanced" if b == "auto" else "plain")
        self.min_keep, self.fill, self.divisor, self.on_miss = float(min_keep), fill, divisor, on_miss
        self.masks: dict[str, MaskedLayer] = masked_layers(model)
        if not self.masks:
            raise ValueError("the model carries no masks: see mmitp.pruning.mask_model")
        self.more_examples = list(more_examples)
        if budget is not None:
            check_budget(budget, cost, self.masks)
        self.cost = budget.cost if budget is not None else make_cost(cost)
        self.budget = budget or MacBudget(model, example, cost=self.cost, more_examples=self.more_examples)
        if not self.budget.n_entries:
            raise ValueError(
                "no mask counts: of the masked layers "
                f"({', '.join(list(self.masks)[:3])}{', ...' if len(self.masks) > 3 else ''}) none runs on the example "
                "input in a way that slimming could use, so nothing can be pruned. Give the pruner an example that "
                "reaches them, or let other layers carry masks (mask_model's include and exclude)"
            )
        require_trainable(self.masks)  # those that cannot count are held open by now
        if halves := {m.prune_mask.dtype for m in self.masks.values()} & {torch.float16, torch.bfloat16}:
            warn(
                f"masks are {halves.pop()}, in which small steps are lost in rounding: put masks on after the cast "
                "(mask_model(model.bfloat16())); they are float32 then"
            )
        self.frozen = all(layer.mask_frozen for layer in self.masks.values())
        if not self.frozen:
            set_masks(self.budget, self.budget.flat_masks().detach())  # tied masks may come from a run without ties
            require_reachable(self.budget, self.target, self.divisor, self.min_keep)
        elif self.budget.kept_cost() > cost_limit(self.budget, self.target):
            warn(
                f"the masks are frozen at {self.ratio():.4f} of the {self.budget.what}, above the target "
                f"{self.target}, and stay so: to train them on, call unfreeze_mask() of each layer of "
                "masked_layers(model) first"
            )
        self.slim_every, self.cut_at = slim_every, 0
        self.off: OffTimes | None = None
        if slim_every is not None:
            check_cuts(slim_every, self.cost)
            require_channels(model)
            self.off = OffTimes()
        self.floor = floors(self.budget, self.min_keep)
        self._floors_bind = int(self.floor.max()) > 1
        self.clock: Clock | None = None
        self.active = False
        self.position = 0
        self._idle = 0  # steps of Optimizer 1 outside of the window
        self.forecast = Forecast()
        self.significance = Significance()
        self.path = PathFollower(self.target, self.steps) if b == "auto" and self.steps else None
        self.read_every = max(self.steps // READS, 1) if self.steps else READ_EVERY
        self.warned_at = -1
        self.warn = warn
        self._task: tuple[Tensor, Tensor] | None = None
        device = next(iter(self.masks.values())).prune_mask.device
        self._device = DeviceState(torch.zeros(self.budget.n_entries, device=device), self.floor)
        self._handles: list[Any] = []
        self._captured = False
        self._bank: MaskBank | None = None if self.frozen else MaskBank(model, self.masks.values())

    # -- in the training loop

    def attach(self, optimizer: torch.optim.Optimizer, captured: bool = False) -> None:
        """Follows every step of Optimizer 1 from now on, by its own hooks: accumulated, unscaled, all-reduced
        gradients.

        Args:
            optimizer: holds all the masks; one in a wrapper (Accelerate's, mmengine's) will do.
            captured: the training step is captured in a CUDA graph. What is replayed runs no hooks, so they do the
                device's half alone (:meth:`update`), and the loop calls :meth:`advance` after every step that ran,
                replayed or not.

        Raises:
            ValueError: it is no optimizer, or does not hold all the masks; the pruner follows an optimizer already, or
                another pruner of the same masks follows this one.
        """
        if self._handles:
            raise ValueError("the pruner follows an optimizer already: detach() it first")
        if self._slimmed is not None:  # as where a run goes on from a slimmed network: there is nothing left to do
            return
        optimizer = bare_optimizer(optimizer)
        require_in_optimizer(self.masks, optimizer)
        mine = {id(layer) for layer in self.masks.values()}
        for call in optimizer._optimizer_step_pre_hooks.values():
            other = getattr(call, "__self__", None)
            if isinstance(other, InTrainPruner) and not other.frozen and mine & set(map(id, other.masks.values())):
                raise ValueError(
                    "another pruner of the same masks follows this optimizer: each would move what the other holds. "
                    "detach() it first"
                )
        self._optimizer, self._captured = optimizer, captured
        after = self.update if captured else self.step
        # Gradients are taken before Optimizer 1, which may overwrite them (Nesterov momentum, clipping of its own).
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(lambda *_: after()),
        ]

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Takes the gradients, or lets ``step(closure)`` do it: there the closure makes them."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer
        if closure is None:
            self.take_gradients(optimizer)
            return None

        def observed() -> Any:
            loss = closure()
            self.take_gradients(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    def detach(self) -> None:
        """Leaves the optimizer alone, and takes the pruner's hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizer = None
        if self._bank is not None:
            self._bank.remove()
            self._bank = None

    @torch.no_grad()
    def take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps ``dL_task/dM`` of Optimizer 1's coming step, with whether it may be used: it is finite, and no
        gradient scaler will skip that step."""
        self._task = None
        if self.frozen:
            return
        self.budget.tie_gradients()
        if not self.active:
            return
        task = task_gradient(self.budget)
        # A GradScaler leaves unscaling, and skipping the step, to a fused optimizer.
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            task = task / scale.to(task.device)
        usable = torch.isfinite(task).all()
        if (overflow := getattr(optimizer, "found_inf", None)) is not None:
            usable = usable & (overflow.to(task.device) == 0).all()
        self._task = task, usable

    def step(self) -> None:
        """Optimizer 2: ``M <- M - lr * (dL_task/dM + b * dL_HW/dM)`` (S2): :meth:`update`, then :meth:`advance`.

        Raises:
            ValueError: a mask is not finite; the message names it, and how long ago it happened.
        """
        self.update()
        self.advance()

    @torch.no_grad()
    def update(self) -> None:
        """The half of a step that a CUDA graph may hold: nothing is read, and no branch depends on a value.

        Its state are tensors changed in place. Nothing changes where the gradient or a mask is not finite.
        """
        task, self._task = self._task, None
        if self.frozen:
            return
        masks, state = self.budget.flat_masks().detach(), self._device
        state.to(masks)
        if self.path is not None:
            self.significance.prepare(masks)  # here, before the first step of the window may be captured
        finite = state.note(masks)
        if task is None:
            return
        gradient, usable = task
        usable = usable & finite
        gradient = torch.where(usable, gradient, 0)
        if self.path is None:
            assert not isinstance(self.b, str)
            push = torch.where(usable, self._push(), 0)
            descend(self.budget, gradient, self.lr)
            descend(self.budget, push, self.lr * self.b)
            self._keep_floors(usable)
        else:
            descend(self.budget, gradient, self.lr)
            self.significance.observe(self.budget, gradient, usable)
            looks = state.seen.remainder(self.path.every) == 0  # its floors come after the look
            self._keep_floors(usable & ~looks)
        state.count(usable)
        self._as_in_main()

    @torch.no_grad()
    def advance(self) -> None:
        """The half of a step that is the host's: it counts the step, and ``b='auto'`` looks at the ratio when it is
        time, without waiting for the device. Now and then it reads whether everything is finite, and how far the masks
        have to go.

        Raises:
            ValueError: a mask is not finite; the message names it, and how long ago it happened. In a captured loop:
                it was not called once for every step that ran.
        """
        if self.frozen:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "the pruner's step is being captured in a CUDA graph, where its counting would be lost: "
                "attach(optimizer, captured=True), and call advance() after every replay"
            )
        if not self.active:
            self._idle += 1
            if (self._idle - 1) % self.read_every == 0:
                self._read()
            return
        step, self.position = self.position, self.position + 1
        if self.path is not None and self.path.looks(step):
            self._look(step)
        if self.off is not None:
            self.off.observe(self.budget.binarize(self.budget.flat_masks().detach()))
        if step % self.read_every == 0:
            self._measure(self._read())

    def _look(self, step: int) -> None:
        """``b='auto'`` takes masks across zero, after step ``step`` of the window."""
        assert self.path is not None
        push = self.budget.marginal_costs()
        if self.push == "balanced":
            push = balanced(self.budget, push)
        fisher = self.significance.fisher() if self.push == "fisher" else None
        worth = self.significance.relative(self.budget) if fisher is None else fisher
        self.path.hold(self.budget, push, step, self._device.floor, worth)
        self._keep_floors()
        self._as_in_main()

    # -- progressive slimming

    @property
    def cut_is_due(self) -> bool:
        """Whether :meth:`cut` would look for something to cut: ``slim_every`` steps have gone by since it last did."""
        return self.slim_every is not None and not self.frozen and self.position - self.cut_at >= self.slim_every

    @torch.no_grad()
    def cut(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        shrink: Callable[[SlimPlan], list[str]] | None = None,
    ) -> int:
        """Progressive slimming: cuts what has been off in each of the last ``slim_every`` steps out of the live model.

        Call it between steps as often as you like: until so many steps have gone by, nothing happens. Losses and ratio
        go on as they were (:mod:`mmitp.pruning.progressive`). The channels that a layer loses do not come back; one
        that no other layer reads is not computed any more. A checkpoint from after a cut needs its pruner loaded
        first (:meth:`load_state_dict`): that gives the dense model the sizes of what is loaded then.

        Args:
            optimizer: the one that trains the model; its state is cut as well.
            shrink: takes the place of ``shrink_live(model, plan, optimizer, keep_masks=True)`` where more has to be
                cut than model and optimizer (averages, distributed wrappers); it returns the names of parameters whose
                optimizer state starts anew.

        Returns:
            How many mask entries went.

        Raises:
            ValueError: there is no ``slim_every``; the step is captured in a CUDA graph; a graph of the network is
                still alive (``del loss`` first).
        """
        if self.slim_every is None or self.off is None:
            raise ValueError("cut() needs to know how long a mask has to be off: InTrainPruner(..., slim_every=steps)")
        if not self.cut_is_due or self.off.steps is None:  # no step has been seen, where a run goes on without a past
            return 0
        if self._captured:
            raise ValueError("a step captured in a CUDA graph has fixed sizes: progressive slimming cannot change them")
        self.cut_at = self.position
        off = self.off.steps
        keep = entries_to_keep(self.budget, off >= self.slim_every, self.target, self.divisor, self.min_keep)
        keep = self._of_main(keep, off.device)
        gone = int((~keep).sum())
        if gone:
            plan, whole_tensors = plan_cut(self.model, self.budget, (self.example, *self.more_examples), keep)
            if shrink is None:
                require_same_training(self.model, plan, self.example, keep_masks=True)
            self._tell_restarted(shrink(plan) if shrink else shrink_live(self.model, plan, optimizer, keep_masks=True))
            note_cut(self.model, self.budget, keep, whole_tensors)
            self._keep_entries(keep)
        return gone

    def _keep_entries(self, keep: Tensor) -> None:
        """Its own flat vectors get shorter with those of the budget."""
        for part in (self.off, self.path, self.significance, self._device):
            if part is not None:
                part.keep(keep)

    def _tell_restarted(self, restarted: list[str]) -> None:
        if restarted:
            self.warn(
                f"the optimizer's state of {len(restarted)} parameters does not have their shape and starts anew "
                f"({restarted[0]} and others)"
            )

    def _push(self, masks: Tensor | None = None) -> Tensor:
        """``dL_HW/dM``, flat over all counting masks: zero where the hinge is closed."""
        gradient = self.budget.hw_gradient(self.target, masks)
        if self.push == "plain":
            return gradient
        on = None if masks is None else self.budget.binarize(masks)
        return as_strong(balanced(self.budget, gradient, on), gradient)

    def _keep_floors(self, usable: Tensor | None = None) -> None:
        """No layer falls below its floor: the highest masks of one that does are put just above zero."""
        if not self._floors_bind:
            return  # what the binarisation does by itself
        masks = self.budget.flat_masks().detach()
        low = highest(self.budget, masks, self._device.floor) & (masks <= 0)
        set_masks(self.budget, torch.where(low if usable is None else low & usable, SIDE / (1 - masks), masks))

    def _as_in_main(self) -> None:
        """The main process's masks, in all of them: budgets of two-stage detectors depend on each one's proposals."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = self.budget.flat_masks().detach().clone()
            dist.broadcast(flat, 0)
            set_masks(self.budget, flat)

    def _read(self) -> Tensor:
        """The flat masks, on the CPU: one wait for the device, in which everything is checked.

        Raises:
            ValueError: see :meth:`advance`.
        """
        masks = self.budget.flat_masks().detach()
        self._device.to(masks)
        both = torch.cat([self._device.counts.double(), masks.double()]).cpu()
        (seen, _, since), masks = both[:3].long().tolist(), both[3:].to(masks.dtype)
        if since:
            raise not_finite(self.budget, self._device.poisoned, ago=since - 1)
        if seen != self.position:
            raise ValueError(
                f"a captured loop has to call advance() once after every step that ran: the device made {seen} steps "
                f"of Optimizer 2, and advance() was called {self.position} times in the window"
            )
        return masks

    def _measure(self, masks: Tensor) -> None:
        left = distance(self.budget, self.target, masks)
        self.forecast.observe(self.position, left)
        if self.path is not None or not self.steps or left <= 0 or len(self.forecast.seen) < 3:
            return
        early = self.position >= max(self.steps // 20, 3 * self.read_every)
        arrival = self.forecast.arrival()
        if not early or arrival <= self.steps or 0 <= self.warned_at > self.position - self.steps // 5:
            return
        self.warned_at = self.position
        speed = push_speed(self.budget, self._push(masks), left, masks)
        needed = self.forecast.needed_push(float(self.b), self.lr, speed, self.steps)
        when = "never" if arrival == math.inf else f"after {arrival / self.steps:.1f} windows"
        self.warn(
            f"at the present pace the target {self.target} is reached {when}: the masks still have {left:.3f} to go "
            f"and {self.steps - self.position} steps left. About b={needed:.3g} (or as much more lr) would do, or "
            "b='auto'. Otherwise the freeze will cut the lowest masks off."
        )

    # -- figures

    @property
    def count(self) -> int:
        """Steps of Optimizer 2 done: those of the window without those that a gradient scaler skipped. Waits for the
        device."""
        return self.position - int(self._device.counts[1])

    def ratio(self) -> float:
        """Part of the dense network's cost that the present masks keep."""
        return self.budget.kept_cost() / self.budget.dense_cost if self._slimmed is None else self._slimmed.ratio

    def hw_loss(self) -> Tensor:
        """``L_HW = max(ratio - psi*, 0)`` (S2), 0-dim float64, differentiable in the masks.

        Raises:
            ValueError: the model was slimmed, and has no masks any more.
        """
        if self._slimmed is not None:
            raise ValueError("the model was slimmed: it has no masks that a loss could move")
        return self.budget.hw_loss(self.target)

    # -- the end of the window

    def freeze(self) -> FreezeReport:
        """Fixes the masks at or under the target; from now on only the weights train. Masks that are frozen, and a
        model that was slimmed, stay as they are.

        Raises:
            RuntimeError: the masks lie above the target and ``on_miss='error'``.
            ValueError: a mask is not finite. Nothing is frozen then.
        """
        if self._slimmed is not None:
            return self._slimmed
        if all(layer.mask_frozen for layer in self.masks.values()):
            self._end()
            return self.report()
        masks = self.budget.flat_masks().detach()
        require_finite(self.budget, self._read())
        if self.clock is not None:
            self.clock.observe()
        before = self.ratio()
        missed = self.budget.kept_cost() > cost_limit(self.budget, self.target)
        if missed and self.position == 0:
            self.warn(
                "no step of the window was seen, so the freeze takes channels that no training has chosen (in a loop "
                "of your own: attach(optimizer) before it, and active=True in the window)"
            )
        if missed and self.on_miss == "error":
            raise RuntimeError(
                f"the masks end at {before:.4f} of the {self.budget.what}, above the target {self.target} "
                "(on_miss='error')"
            )
        if missed and self.on_miss == "warn":
            self.warn(
                f"the masks end at {before:.4f} of the {self.budget.what}, above the target {self.target} "
                "(on_miss='warn'): frozen as they are"
            )
            pattern, switched_off, switched_on = self.budget.flat_pattern().cpu(), 0, 0
        else:
            order = self._order()
            if self.clock is None:
                found = project(self.budget, self.target, self.fill, self.divisor, self.min_keep, order)
            else:
                found = self.clock.project(self.fill, order)
            pattern, switched_off, switched_on = found.pattern, found.switched_off, found.switched_on
        pattern = self._of_main(pattern, masks.device)
        freeze_masks(self.model, self.budget.split(pattern))
        self._end()
        return self._report(before, switched_off, switched_on)

    def _end(self) -> None:
        self.frozen, self.active = True, False
        if self._bank is not None:
            self._bank.remove()
            self._bank = None

    def _report(self, before: float, switched_off: int = 0, switched_on: int = 0) -> FreezeReport:
        return freeze_report(self.model, self.budget, self.target, before, switched_off, switched_on, self.clock)

    def _order(self) -> Tensor | None:
        """With ``push='fisher'`` a flat vector of the masks' pattern, on the CPU, whose values are the order in which
        masks go: the loss that a MAC of each holds, which their own values do not tell."""
        fisher = self.significance.fisher() if self.push == "fisher" else None
        if fisher is None:
            return None
        worth = (fisher / self.budget.marginal_costs().clamp(min=1e-30)).clamp(min=1e-30, max=1e30)
        return torch.where(self.budget.flat_pattern(), worth, -1 / worth).cpu()

    @staticmethod
    def _of_main(pattern: Tensor, device: torch.device) -> Tensor:
        """The main process's pattern, in all of them."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return pattern
        shared = pattern.to(device, torch.uint8)
        dist.broadcast(shared, 0)
        return shared.to("cpu", torch.bool)

    def report(self) -> FreezeReport:
        """The figures under the masks' present patterns, frozen or not; of a network slimmed since, its last ones."""
        return self._report(self.ratio()) if self._slimmed is None else self._slimmed

    def slim(self, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """The network without masks and without what they drop.

        Args:
            optimizer: none: returns a copy (:func:`mmitp.pruning.slim`). The one that trains the model: shrinks the
                model itself and the optimizer's state with it, and training goes on (:mod:`mmitp.pruning.live`); the
                pruner has done its work then.

        Raises:
            ValueError: the network trains on what its evaluation pass does not compute, so that the slimmed one would
                not train the same (the live model alone), or it was slimmed before; nothing has changed then.
            RuntimeError: as :func:`mmitp.pruning.slim`.
        """
        if optimizer is None:
            small, self.plan = slim_with_plan(self.model, self.example, self.budget, self.more_examples)
            return small
        plan = plan_live(self.model, self.example, self.budget, self.more_examples)
        require_same_training(self.model, plan, self.example)
        report = self.report()
        if not self.frozen and report.ratio > self.target:
            self.warn(
                f"the network is slimmed at {report.ratio:.4f} of the {report.cost}, above the target {self.target}: "
                "freeze() before slim() meets it"
            )
        self._tell_restarted(shrink_live(self.model, plan, optimizer))
        self._leave(plan, report)
        return self.model

    def _leave(self, plan: SlimPlan, report: FreezeReport) -> None:
        """The live model has been slimmed: the pruner has done its work."""
        self.plan, self._slimmed, self.masks = plan, report, {}
        self._end()
        self.detach()

    # -- checkpoints

    def settings(self) -> dict[str, Any]:
        """The arguments that a checkpoint remembers."""
        margin = getattr(self.cost, "margin", None)
        return dict(
            target=self.target,
            b=self.b,
            lr=self.lr,
            steps=self.steps,
            push=self.push,
            min_keep=self.min_keep,
            fill=self.fill,
            divisor=self.divisor,
            cost=self.budget.what if margin is None else f"{self.budget.what}, margin {margin:g}",
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs besides model and optimizer: going on from it is exact, before the window, in
        it, after it, and once the live model has been slimmed. Plain values and tensors
        (``torch.load(weights_only=True)``).

        Raises:
            ValueError: a mask is not finite.
        """
        trains = not self.frozen
        if trains:
            require_finite(self.budget, self._read())
        counted = self.cost.counted if isinstance(self.cost, LatencyCost) and self.cost.calibrated else None
        return dict(
            settings=self.settings(),
            layout=mask_layout(self.model),
            count=self.count,
            position=self.position,
            frozen=self.frozen,
            warned_at=self.warned_at,
            forecast=self.forecast.state_dict(),
            significance=self.significance.state_dict() if trains else None,
            path=self.path.state_dict() if trains and self.path is not None else None,
            counted=counted,
            cut=cut_state(self.budget) if self._slimmed is None else None,  # its plan is one of the dense network
            cut_at=self.cut_at,
            off=self.off.state_dict() if trains and self.off is not None else None,
            slimmed=None if self._slimmed is None else self._slimmed_state(),
        )

    def _slimmed_state(self) -> dict[str, Any]:
        assert self.plan is not None and self._slimmed is not None
        return dict(spec=self.plan.spec(), report=self._slimmed.to_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`. Settings that differ are obeyed and said, as long as masks still train.

        Call it first, then load model and optimizer: where the network had been slimmed, by :meth:`slim` or on the
        way, the masked model is brought to its sizes here. After :meth:`slim` the masks leave the optimizer that the
        pruner follows, too.

        Raises:
            ValueError: it is no such state; the masks were others; they are frozen and the settings that decided on
                the pattern differ.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the pruner's state must be a dictionary, got {type(state).__name__}")
        if (slimmed := state.get("slimmed")) is not None:
            if problem := unlike(slimmed, dict(spec={}, report=self.report().to_dict()), "the pruner's state: slimmed"):
                raise ValueError(problem)
            self._require_same_outcome(state)
            plan = SlimPlan.from_spec(slimmed["spec"])
            shrink_live(self.model, plan, self._optimizer)
            self.position = state["position"]
            self._leave(plan, FreezeReport.from_dict(slimmed["report"]))
            return
        if (cut := state.get("cut")) is not None and self.budget.cut is None:
            plan = restore_cut(self.model, self.budget, cut)
            shrink_live(self.model, plan, keep_masks=True)
            self._device.keep(self.budget.in_dense(torch.ones(self.budget.n_entries, dtype=torch.bool)))
        example = self.state_dict() | dict(layout={}, settings={}, forecast=dict(seen=[(0, 0.0)]))
        if problem := unlike(state, example, "the pruner's state"):
            raise ValueError(problem)
        require_same_layout(state["layout"], mask_layout(self.model))
        changed = self._require_same_outcome(state)
        if changed and not state["frozen"]:
            told = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
            self.warn(f"the checkpoint was written with other settings, those of now count ({told})")
        device = self.budget.flat_masks().device
        self.frozen, self.warned_at = state["frozen"], state["warned_at"]
        self.position = state["position"]
        self._device.start(self.position, skipped=self.position - state["count"])
        self.forecast.load_state_dict(state["forecast"])
        if state["significance"] is not None:
            self.significance.load_state_dict(state["significance"], device)
        if self.path is not None and state["path"] is not None:
            self.path.load_state_dict(state["path"], device)
        if isinstance(self.cost, LatencyCost) and state.get("counted") is not None:
            self.cost.counted = state["counted"]
        self.cut_at = state["cut_at"]
        if self.off is not None and state.get("off") is not None:
            self.off.load_state_dict(state["off"], device)
        if self.frozen:
            self._end()

    def _require_same_outcome(self, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from a saved state's: then and now.

        Raises:
            ValueError: its masks are frozen, and some of them decided on the pattern.
        """
        now, then = self.settings(), state["settings"]
        changed = {key: (then[key], now[key]) for key in now if key in then and then[key] != now[key]}
        if state["frozen"] and (fixed := [key for key in OUTCOME if key in changed]):
            raise ValueError(frozen_otherwise({key: changed[key] for key in fixed}))
        return changed
