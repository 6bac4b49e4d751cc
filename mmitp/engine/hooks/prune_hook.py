"""PruneHook: schedules the in-train pruning of S1/S2 on any mmengine runner."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.dist import broadcast, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch import Tensor, nn

from mmitp.engine.example import blank_example, example_inputs
from mmitp.engine.live import require_same_training, require_slimmable, slim_runner, without_runner_hooks
from mmitp.models.slim import is_masked, slim_config
from mmitp.pruning import LayerRow, MacBudget, MaskedLayer, SlimPlan, masked_layers
from mmitp.pruning.calibration import Calibration
from mmitp.pruning.cost import Cost, LatencyCost, make_cost
from mmitp.pruning.freeze import freeze_masks, lowest_ratio, project
from mmitp.pruning.latency import clock_ratio, processor
from mmitp.pruning.live import plan_live
from mmitp.pruning.masks import MaskBank
from mmitp.pruning.pressure import (
    AutoPressure,
    Forecast,
    balanced,
    descend,
    distance,
    path,
    push_speed,
    ratio_and_gradient,
    task_gradient,
)
from mmitp.pruning.report import parameter_counts
from mmitp.registry import HOOKS

STATE_KEY = "mmitp_prune_hook"

#: Checkpoint of a run that was stopped before its masks froze.
STOPPED = "stopped.pth"

#: A latency budget is compared with the clock so many times in the window: some seconds each.
CALIBRATIONS = 10


@HOOKS.register_module()
class PruneHook(Hook):
    """Optimizer 2 of S2 on the masks, the budget's promise at the end, and what is logged in between.

    The model carries masks already (``model = dict(type='mmitp.MaskedModel', of=...)``); they are ordinary
    parameters of the config's optimizer (Optimizer 1: task loss and weight decay). While ``begin <= epoch < end`` this
    hook follows every optimizer step by ``M <- M - lr * (dL_task/dM + b * dL_HW/dM)``, with the task gradient that
    Optimizer 1 has just used. At ``end`` the masks freeze at or under ``target``.

    Args:
        target: ``psi*``, fraction of the whole model's MACs (or other ``cost``) to keep, in (0, 1).
        b: weight of ``L_HW`` (S1: 10; 50 for a target of 0.2), or ``'auto'``: a closed loop that keeps the ratio on a
            half-cosine path from 1 to ``target`` over the first 70 % of the window with the smallest push that does,
            in the direction of :func:`mmitp.pruning.pressure.balanced` (``lr`` then only weighs the task gradient).
        begin, end: the window, in epochs (S1: 20 and 240 of 300), or in iterations with an iteration-based loop.
        lr: learning rate of Optimizer 2 (S1: 0.01), SGD without momentum.
        interval: Optimizer 2 steps with every optimizer step (``'iter'``) or with the last of each epoch (``'epoch'``).
        on_miss: what to do if the masks end above the target: ``'project'`` switches the lowest ones off until it
            is met, ``'error'`` stops, ``'warn'`` freezes them as they are.
        fill: switch the best dropped channels back on up to within 1 % of the target.
        divisor: at the freeze every layer keeps a multiple of so many channels (8, 16), read and computed, or all it
            has: kernels work on that many at a time, and what lies between costs what the next multiple costs.
        input_shape: (H, W) the MACs are stated for; by default the size of the first training batch.
        cost: what ``target`` is a fraction of: ``'macs'``, ``'params'``, or measured latency,
            ``dict(type='latency', table='table.json', margin=0.1)`` with a table from ``tools/profile_latency.py``
            (see :class:`mmitp.pruning.cost.LatencyCost`). On the table's machine the run ends at or under the target
            by the clock: slimmed copies are timed beside the dense network ten times in the window and at the freeze
            (see :class:`mmitp.pruning.calibration.Calibration`). On another one, where its times cannot be checked, the
            table less its margin is believed, and a warning says so.
        slim_at_end: at ``end`` cut what the frozen masks drop out of the live model (weights, BatchNorm, averaged
            copies, optimizer state): the remaining epochs train the small network, with the masked one's losses up to
            rounding (see :mod:`mmitp.pruning.live`). Checkpoints hold the small network from then on; they resume, and
            ``<work_dir>/slim/config.py`` loads them like any config.

    Raises:
        ValueError: an argument out of range; no masks in the model or the optimizer; the window does not fit the run;
            the target is below the cheapest reachable ratio. ``RuntimeError`` with ``on_miss='error'``.
    """

    # Before EMA (NORMAL) averages and before checkpoints (VERY_LOW) are written.
    priority = "ABOVE_NORMAL"

    def __init__(
        self,
        target: float,
        b: float | str = 10.0,
        begin: int = 20,
        end: int = 240,
        lr: float = 0.01,
        interval: str = "iter",
        on_miss: str = "project",
        fill: bool = False,
        divisor: int = 1,
        input_shape: Sequence[int] | None = None,
        slim_at_end: bool = False,
        cost: str | dict[str, Any] | Cost = "macs",
    ) -> None:
        if not 0 < target < 1:
            raise ValueError(f"PruneHook target must be a fraction of the operations in (0, 1), got {target}")
        if not (b == "auto" or isinstance(b, (int, float)) and b >= 0):
            raise ValueError(f"PruneHook b must be a number >= 0 or 'auto', got {b!r}")
        if not 0 <= begin < end:
            raise ValueError(f"PruneHook needs 0 <= begin < end, got begin={begin}, end={end}")
        if lr <= 0:
            raise ValueError(f"PruneHook lr must be positive, got {lr}")
        if interval not in ("iter", "epoch"):
            raise ValueError(f"PruneHook interval must be 'iter' or 'epoch', got {interval!r}")
        if on_miss not in ("project", "error", "warn"):
            raise ValueError(f"PruneHook on_miss must be 'project', 'error' or 'warn', got {on_miss!r}")
        if divisor < 1:
            raise ValueError(f"PruneHook divisor must be a positive number of channels, got {divisor}")
        if input_shape is not None and len(input_shape) != 2:
            raise ValueError(f"PruneHook input_shape must be (H, W), got {input_shape}")
        self.target, self.b, self.begin, self.end, self.lr = float(target), b, begin, end, lr
        self.interval, self.on_miss, self.fill, self.slim_at_end = interval, on_miss, fill, slim_at_end
        self.divisor = int(divisor)
        self.cost = make_cost(cost)
        self.input_shape = (int(input_shape[0]), int(input_shape[1])) if input_shape is not None else None
        self.channels: int | None = None  # of the images
        self.budget: MacBudget | None = None
        self.frozen = False
        #: spec and MACs of the slimmed network once it has taken the masked one's place; there is no budget then
        self.slimmed: dict[str, Any] | None = None
        self.steps = 0
        self.forecast = Forecast()
        self.auto: AutoPressure | None = None
        self.warned_at = -1
        self.calibration: Calibration | None = None
        self._pending: dict[str, Any] | None = None
        self._best_rules: dict[CheckpointHook, Any] = {}
        self._steps_now = False
        self._task: Tensor | None = None
        self._bank: MaskBank | None = None

    # -- set-up

    def before_train(self, runner: Runner) -> None:
        self.logger = MMLogger.get_current_instance()
        model = self._model(runner)
        self.masks = {name: layer for name, layer in masked_layers(model).items()}
        if not self.masks and self.slimmed is None:
            raise ValueError(
                "PruneHook found no masks in the model. Compose the config with one more line: "
                "model = dict(type='mmitp.MaskedModel', of=<the model's type>)"
            )
        if self.slim_at_end and self.slimmed is None:
            require_slimmable(runner)
        self._check_window(runner)
        self.frozen = all(layer.mask_frozen for layer in self.masks.values())
        if not self.frozen:
            self._bank = MaskBank(model, self.masks.values())
        optimizer = self._optimizer(runner)
        self._report_groups(optimizer)
        self._spare_masks_from_clipping(runner.optim_wrapper)
        # Both fire after accumulation and all-reduce, and before the gradients are cleared. The gradients are taken
        # before Optimizer 1, which may overwrite them (Nesterov momentum, optimizers that clip by themselves).
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._take_gradients(optimizer)),
            optimizer.register_step_post_hook(lambda *_: self._optimizer_2()),
        ]
        self.runner = runner

    def _check_window(self, runner: Runner) -> None:
        self.by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
        unit, last = ("iterations", runner.max_iters) if self.by_iter else ("epochs", runner.max_epochs)
        if self.end > last:
            raise ValueError(
                f"PruneHook's window ends after {self.end} {unit}, but the run stops at {last}. "
                f"The paper's proportions would be begin={max(round(last / 15), 1)}, end={last * 4 // 5}"
            )
        if self.by_iter and self.interval == "epoch":
            raise ValueError(
                "PruneHook interval='epoch' needs a loop by epochs; with an iteration-based one use 'iter'"
            )
        self.length = 1 if self.by_iter else len(runner.train_dataloader)
        self.window_steps = max((self.end - self.begin) * self.length // self._accumulation(runner), 1)
        if self.interval == "epoch":
            self.window_steps = min(self.window_steps, self.end - self.begin)
        self.measure_every = max(self.window_steps // (200 if self.b == "auto" else 50), 1)
        self.calibrate_every = max(self.window_steps // CALIBRATIONS, 1)
        if self.b == "auto":
            self.auto = AutoPressure(self.target, self.lr, self.window_steps)
        if self._pending is not None:
            self._restore(self._pending)

    @staticmethod
    def _accumulation(runner: Runner) -> int:
        return int(getattr(runner.optim_wrapper, "_accumulative_counts", 1))

    def _optimizer(self, runner: Runner) -> torch.optim.Optimizer:
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict) or not isinstance(wrapper, OptimWrapper):
            raise ValueError(f"PruneHook needs a single OptimWrapper, got {type(wrapper).__name__}")
        return wrapper.optimizer

    def _report_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Says what the optimizer does to the masks: parameter-wise options can change it unseen."""
        ids = {id(layer.prune_mask): name for name, layer in self.masks.items()}
        seen: dict[tuple[float, float, str], int] = {}
        for group in optimizer.param_groups:
            count = sum(ids.pop(id(p), None) is not None for p in group["params"])
            if count:
                decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
                kind = "decoupled" if decoupled else "L2"
                key = (float(group["lr"]), float(group.get("weight_decay", 0.0)), kind)
                seen[key] = seen.get(key, 0) + count
        if ids:
            raise ValueError(
                f"the optimizer does not hold the mask of {next(iter(ids.values()))!r} ({len(ids)} in all): masks must "
                "be in the model before the optimizer is built (mmitp.MaskedModel does that)"
            )
        for (lr, decay, kind), count in seen.items():
            self.logger.info(
                f"PruneHook: {count} masks in {type(optimizer).__name__} with lr {lr:g}, {kind} weight decay {decay:g}"
            )

    def _spare_masks_from_clipping(self, wrapper: OptimWrapper) -> None:
        """Clipping by norm sees the weights only: mask gradients neither count in the norm nor are scaled."""
        clip = getattr(wrapper, "clip_func", None)
        if clip is None:
            return
        ids = {id(layer.prune_mask) for layer in self.masks.values()}
        wrapper.clip_func = lambda params, **kw: clip([p for p in params if id(p) not in ids], **kw)

    def _build_budget(self, runner: Runner, data_batch: Any) -> None:
        model = self._model(runner)
        self._require_trainable()
        example = example_inputs(model, data_batch, self.input_shape)
        shape = torch.tensor(example["inputs"].shape[-2:])
        broadcast(shape)  # batches of different sizes in different processes, but one budget
        self.input_shape = (int(shape[0]), int(shape[1]))
        if example["inputs"].shape[-2:] != self.input_shape:
            example = example_inputs(model, data_batch, self.input_shape)
        self.channels = example["inputs"].shape[1]
        self.budget = MacBudget(model, example, cost=self.cost)
        self.logger.info(
            f"PruneHook: {self.budget.dense_macs / 1e9:.4f} GMACs dense, {len(self.budget.masked)} of "
            f"{len(self.budget.layers)} layers masked, target {self.target} of the {self.budget.what}"
        )
        for name, why in self.budget.unfollowed.items():
            self.logger.warning(f"PruneHook: {name}: {why}")
        if self.frozen and not getattr(runner, "_resume", False) and self._ratio() > self.target:
            self.logger.info(
                f"PruneHook: the masks of load_from are frozen at {self._ratio():.4f} of the {self.budget.what}, above "
                f"the target {self.target}: they train again"
            )
            for layer in self.masks.values():
                layer.unfreeze_mask()
            self.frozen, self._bank = False, MaskBank(model, self.masks.values())
        if not self.frozen and (low := lowest_ratio(self.budget, self.divisor)) > self.target:
            raise ValueError(
                f"PruneHook target {self.target} cannot be reached: with {self.divisor} input channel(s) a layer "
                f"{low:.4f} of the {self.budget.what} remain. Raise the target or let more layers carry masks "
                "(model.prune)"
            )
        if self.slim_at_end:
            require_same_training(model, example, data_batch)
            self._example = example
        if isinstance(self.cost, LatencyCost) and not self.frozen:
            blank = blank_example(model, self.input_shape, example["inputs"].shape[1], self.cost.table.get("batch", 1))
            self.calibration = self._calibration(model, blank, self.budget, self.cost)

    def _require_trainable(self) -> None:
        fixed = [n for n, m in self.masks.items() if not (m.mask_frozen or m.prune_mask.requires_grad)]
        if fixed:
            raise ValueError(
                f"the masks of {', '.join(fixed[:3])} ({len(fixed)} in all) do not train: something, such as "
                "frozen_stages, froze these layers after the model was built. Leave them dense: "
                f"model.prune = dict(exclude={fixed})"
            )

    def _calibration(
        self, model: nn.Module, example: dict[str, Any], budget: MacBudget, cost: LatencyCost
    ) -> Calibration | None:
        table = cost.table
        measured_on, here = table.get("machine", "an unknown machine"), processor(table.get("device", "cpu"))
        if not self._of_main(lambda: measured_on == here):
            self.logger.warning(
                f"PruneHook: {cost.source} was measured on {measured_on}, this is {here or 'without such a device'}: "
                f"its times cannot be checked here. The target is met by the table, with {1 - cost.counted:.2g} of the "
                "saving not counted on; benchmark the slimmed network on its own machine"
            )
            return None

        def measure(pattern: Tensor) -> float:
            with without_runner_hooks(model):
                return self._of_main(lambda: clock_ratio(model, example, budget, pattern))

        return Calibration(budget, self.target, measure, self.divisor)

    @staticmethod
    def _of_main(value: Callable[[], float]) -> float:
        """What the main process finds, in all of them: no two clocks agree."""
        found = torch.zeros(1, dtype=torch.float64)
        if is_main_process():
            found[0] = value()
        broadcast(found)
        return float(found)

    def _ratio(self) -> float:
        if self.slimmed is not None:
            return self.slimmed["ratio"]
        assert self.budget is not None
        return self.budget.kept_cost() / self.budget.dense_cost

    # -- the window

    def _in_window(self) -> bool:
        now = self.runner.iter if self.by_iter else self.runner.epoch
        return self.begin <= now < self.end and not self.frozen

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.slimmed is not None:
            return
        if self.budget is None:
            self._build_budget(runner, data_batch)
        now = runner.iter if self.by_iter else runner.epoch
        if not self.frozen and now >= self.end:
            self.logger.warning(f"PruneHook: training goes on at {now}, past the window's end, with masks not frozen")
            self._freeze(runner)
        if self.slim_at_end and self.frozen:
            self._slim(runner)  # resumed from a checkpoint with frozen masks
        self._steps_now = self._in_window() and (self.interval == "iter" or self._is_last_update(runner, batch_idx))
        if self._steps_now and self.calibration is not None and self.steps % self.calibrate_every == 0:
            if self.calibration.calibrate():
                self._tell_clock()

    def _is_last_update(self, runner: Runner, batch_idx: int) -> bool:
        """Whether this iteration updates the weights (gradients may accumulate) and no later one of its epoch does."""
        left, every = self.length - (batch_idx + 1), self._accumulation(runner)
        if runner.epoch + 1 == runner.max_epochs:
            return left == 0  # the run's last iteration updates in any case
        return left < every and (runner.iter + 1) % every == 0

    def _tell_clock(self) -> None:
        assert self.calibration is not None
        self.logger.info(
            f"PruneHook: slimmed to the present masks the network takes {self.calibration.clock:.4f} of the dense "
            f"latency by the clock, {self.calibration.table:.4f} by the table"
        )

    @torch.no_grad()
    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        self._task = None
        if not self._steps_now:
            return
        assert self.budget is not None
        task = task_gradient(self.budget)
        # A GradScaler leaves unscaling, and skipping the step, to a fused optimizer.
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            task = task / scale.to(task.device)
        overflow = getattr(optimizer, "found_inf", None)
        if bool(torch.isfinite(task).all()) and not (overflow is not None and bool(overflow)):
            self._task = task

    @torch.no_grad()
    def _optimizer_2(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        assert self.budget is not None
        ratio, push = ratio_and_gradient(self.budget)
        if self.auto is not None:
            push = balanced(self.budget, push)
        b = self._pressure(ratio, push)
        descend(self.budget, task, self.lr)
        if self.auto is not None and b > 0:
            b = self.auto.restrain(self.budget, push, b, self.steps)
        if b > 0:
            descend(self.budget, push, self.lr * b)
        if get_world_size() > 1:
            self._as_in_main()
        self.steps += 1

    def _as_in_main(self) -> None:
        """The main process's masks, in all of them: budgets of two-stage detectors depend on each one's proposals."""
        assert self.budget is not None
        masks: list[Tensor] = [layer.prune_mask.data for _, layer in self.budget.masked]
        flat = torch.cat([mask.reshape(-1) for mask in masks])
        broadcast(flat)
        torch._foreach_copy_(masks, list(self.budget.split(flat).values()))

    def _pressure(self, ratio: float, gradient: Tensor) -> float:
        """``b`` for this step: 0 where the hinge (or the path) is satisfied."""
        assert self.budget is not None
        if self.steps % self.measure_every == 0:
            left = distance(self.budget, self.target)
            self.forecast.observe(self.steps, left)
            if self.auto is not None:
                self.auto.update(self.budget, gradient, self.steps, self.measure_every)
            else:
                self._warn_if_late(gradient, left)
        if self.auto is not None:
            return self.auto.b
        return float(self.b) if ratio > self.target else 0.0

    def _warn_if_late(self, gradient: Tensor, left: float) -> None:
        assert self.budget is not None
        early = self.steps >= max(self.window_steps // 20, 3 * self.measure_every)
        if not early or left <= 0 or len(self.forecast.seen) < 3:
            return
        arrival = self.forecast.arrival()
        if arrival <= self.window_steps or 0 <= self.warned_at > self.steps - self.window_steps // 5:
            return
        self.warned_at = self.steps
        speed = push_speed(self.budget, gradient, left)
        needed = self.forecast.needed_push(float(self.b), self.lr, speed, self.window_steps)
        when = "never" if arrival == float("inf") else f"after {arrival / self.window_steps:.1f} windows"
        self.logger.warning(
            f"PruneHook: at the present pace the target {self.target} is reached {when}: the masks still have "
            f"{left:.3f} to go and {self.window_steps - self.steps} steps left. "
            f"About b={needed:.3g} (or as much more lr) would do, or b='auto'. Otherwise the freeze will cut the "
            "lowest masks off."
        )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        ratio = self._ratio()
        hub = runner.message_hub
        hub.update_scalar("train/ops_kept", ratio)
        hub.update_scalar("train/L_HW", max(ratio - self.target, 0.0))
        if self._steps_now:
            hub.update_scalar("train/mask_distance", self.forecast.seen[-1][1] if self.forecast.seen else 0.0)
            if self.auto is not None:
                hub.update_scalar("train/b", self.auto.b)
                hub.update_scalar("train/ops_path", path(self.steps / self.auto.arrival, self.target))
        if self.by_iter and not self.frozen and runner.iter + 1 >= self.end:
            self._freeze(runner)
            if self.slim_at_end:
                outputs = outputs or {}
                outputs.update({key: value.detach() for key, value in outputs.items()})  # lets go of the graph
                self._slim(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        if not self.by_iter and not self.frozen and runner.epoch + 1 >= self.end:
            self._freeze(runner)
            if self.slim_at_end:
                self._slim(runner)

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        if not self.frozen and self.budget is not None:
            self.logger.warning(
                "PruneHook: training stopped before the window's end; the masks freeze now, after the last save: "
                f"{os.path.join(runner.work_dir, STOPPED)} holds the outcome"
            )
            self._freeze(runner)
            if self.slim_at_end:
                self._slim(runner)
            done = dict(epoch=runner.epoch, iter=runner.iter)
            runner.save_checkpoint(runner.work_dir, STOPPED, meta=done, by_epoch=not self.by_iter)

    # -- the freeze

    def _freeze(self, runner: Runner) -> None:
        assert self.budget is not None
        model = self._model(runner)
        if self.calibration is not None:
            self.calibration.observe()
        before = self._ratio()
        limit = int(self.target * self.budget.dense_cost)
        if self.budget.kept_cost() > limit and self.on_miss != "project":
            text = f"PruneHook: the masks end at {before:.4f} of the {self.budget.what}, above the target {self.target}"
            if self.on_miss == "error":
                raise RuntimeError(text + " (on_miss='error')")
            self.logger.warning(text + " (on_miss='warn'): frozen as they are")
            freeze_masks(model)
            switched_off = switched_on = 0
        else:
            if self.calibration is None:
                result = project(self.budget, self.target, self.fill, self.divisor)
            else:
                result = self.calibration.project(self.fill)
            pattern = result.pattern.clone()
            if get_world_size() > 1:
                broadcast(pattern)
            freeze_masks(model, self.budget.split(pattern))
            switched_off, switched_on = result.switched_off, result.switched_on
        self.frozen = True
        self._steps_now = False
        if self._bank is not None:
            self._bank.remove()
        self._sync_ema(runner)
        ratio = self._ratio()
        self.logger.info(
            f"PruneHook: masks frozen at {ratio:.4f} of the {self.budget.what} ({self.budget.kept_cost()} of "
            f"{self.budget.dense_cost} {self.budget.unit}; {before:.4f} before), target {self.target}: {switched_off} "
            f"masks switched off to meet it, {switched_on} switched on to fill it"
        )
        if self.calibration is not None:
            self._tell_clock()
            if self.on_miss == "project" and self.calibration.clock > self.target:
                self.logger.warning(
                    f"PruneHook: the target {self.target} is missed by the clock: even the cheapest network the masks "
                    f"allow takes {self.calibration.clock:.4f} of the dense latency, whatever its table says"
                )
        single = any(layer.mask_granularity == "weight" for layer in self.masks.values())
        with without_runner_hooks(model):
            params_dense, params_kept = parameter_counts(model, self.budget)
        how = (
            "single weights: the operations are multiplications by those not masked to zero, and slimming keeps zeros"
            if single
            else "as the slimmed network has them"
        )
        self.logger.info(
            f"PruneHook: {params_kept} of {params_dense} parameters kept ({params_kept / params_dense:.4f}), {how}"
        )
        rows = self.budget.table()
        self.logger.info("PruneHook: channels kept by layer\n" + format_table(rows))
        if hasattr(runner, "visualizer"):
            runner.visualizer.add_scalars(
                {f"channels_kept/{row.name}": row.in_kept / row.in_channels for row in rows}, step=runner.iter + 1
            )
        if is_main_process():
            report = dict(
                target=self.target,
                ratio=ratio,
                cost=self.budget.what,
                macs_dense=self.budget.dense_macs,
                macs_kept=self.budget.kept_macs(),
                granularity="weight" if single else "channel",
                params_dense=params_dense,
                params_kept=params_kept,
                ratio_before=before,
                by_clock=self.calibration.clock if self.calibration is not None else None,
                by_table=self.calibration.table if self.calibration is not None else None,
                switched_off=switched_off,
                switched_on=switched_on,
                layers=[row._asdict() for row in rows],
            )
            with open(os.path.join(runner.work_dir, "pruning.json"), "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)

    def _slim(self, runner: Runner) -> None:
        assert self.budget is not None
        model = self._model(runner)
        params = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("prune_mask"))
        with without_runner_hooks(model):
            plan = plan_live(model, self._example, self.budget)
        macs = dict(macs_dense=self.budget.dense_macs, macs_kept=self.budget.kept_macs())
        slim = dict(spec=plan.spec(), ratio=self._ratio(), **macs)
        self._become(runner, plan, slim)
        self.logger.info(
            f"PruneHook: training goes on with the slimmed network, {sum(p.numel() for p in model.parameters())} of "
            f"{params} parameters"
        )

    def _become(self, runner: Runner, plan: SlimPlan, slim: dict[str, Any]) -> None:
        if restarted := slim_runner(runner, plan):
            MMLogger.get_current_instance().warning(
                f"PruneHook: the optimizer's state of {len(restarted)} parameters does not have their shape and starts "
                f"anew ({restarted[0]} and others)"
            )
        self.slimmed, self.budget, self.masks = slim, None, {}
        if is_main_process() and is_masked(runner.cfg.get("model", {})):
            folder = os.path.join(runner.work_dir, "slim")
            os.makedirs(folder, exist_ok=True)
            slim_config(runner.cfg, plan).dump(os.path.join(folder, "config.py"))

    # -- evaluation and checkpoints

    def before_val_epoch(self, runner: Runner) -> None:
        self._sync_ema(runner)
        if self.budget is None and self.slimmed is None:
            return
        # 'best' is only kept from models within the budget.
        within = self.frozen or self._ratio() <= self.target
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.save_best:
                self._best_rules[hook] = hook.save_best
        for hook, rule in self._best_rules.items():
            hook.save_best = rule if within else None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._sync_ema(runner)
        checkpoint[STATE_KEY] = dict(
            input_shape=self.input_shape,
            channels=self.channels,
            steps=self.steps,
            frozen=self.frozen,
            warned_at=self.warned_at,
            forecast=self.forecast.state_dict(),
            auto=self.auto.state_dict() if self.auto is not None else None,
            slimmed=self.slimmed,
            counted=self.cost.counted if isinstance(self.cost, LatencyCost) and self.cost.calibrated else None,
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(STATE_KEY, {})
        resume = getattr(runner, "_resume", False)
        if (slim := state.get("slimmed")) and self.slimmed is None:
            if isinstance(runner._train_loop, BaseLoop) and not resume:
                raise ValueError(
                    "load_from names a checkpoint of a slimmed network, which fits no masked one: resume it, or train "
                    "on with the slim/config.py beside it"
                )
            # Before EMA's hook loads its copy, and before the Runner loads model and optimizer.
            self._become(runner, SlimPlan.from_spec(slim["spec"]), slim)
            self.input_shape, self.channels = state["input_shape"], state.get("channels")
        if resume and state:
            self._pending = state

    def _restore(self, state: dict[str, Any]) -> None:
        self.steps, self.frozen, self.warned_at = state["steps"], state["frozen"], state["warned_at"]
        self.input_shape = self.input_shape or state["input_shape"]
        self.channels = state.get("channels")
        self.forecast.load_state_dict(state["forecast"])
        if self.auto is not None and state["auto"] is not None:
            self.auto.load_state_dict(state["auto"])
        if isinstance(self.cost, LatencyCost) and state.get("counted") is not None:
            self.cost.counted = state["counted"]

    def _sync_ema(self, runner: Runner) -> None:
        """The averaged model prunes what the trained one prunes: averages of masks would drift apart."""
        source = getattr(self, "masks", None)
        if source is None:
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                for name, layer in masked_layers(hook.ema_model.module).items():
                    copy_mask(source[name], layer)

    @staticmethod
    def _model(runner: Runner) -> nn.Module:
        return runner.model.module if is_model_wrapper(runner.model) else runner.model


def copy_mask(source: MaskedLayer, target: MaskedLayer) -> None:
    """Makes ``target`` mask exactly as ``source`` does."""
    target.prune_mask.data.copy_(source.prune_mask.data)
    target.prune_pattern.copy_(source.prune_pattern)
    target.mask_frozen = source.mask_frozen


def format_table(rows: Sequence[LayerRow]) -> str:
    """The budget's rows as aligned text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'layer':<{width}}  {'in':>11}  {'out':>11}  {'MMACs dense':>12}  {'kept':>10}"]
    for r in rows:
        lines.append(
            f"{r.name:<{width}}  {f'{r.in_kept}/{r.in_channels}':>11}  {f'{r.out_kept}/{r.out_channels}':>11}  "
            f"{r.macs_dense / 1e6:>12.2f}  {r.macs_kept / 1e6:>10.2f}  {r.note}".rstrip()
        )
    return "\n".join(lines)
