"""PruneHook: schedules the in-train pruning of S1/S2 on any mmengine runner."""

from __future__ import annotations

import copy
import os
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook, LoggerHook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import BaseLoop, Runner
from torch import nn

from mmitp.engine.attack import unwrap
from mmitp.engine.calibrate import calibration
from mmitp.engine.example import blank_example, example_inputs
from mmitp.engine.prune_log import tell_freeze, tell_groups, tell_ratio
from mmitp.engine.surgery import require_same_training, require_slimmable, slim_runner, without_runner_hooks
from mmitp.engine.window import RunLength, check_window, fit_window, is_part
from mmitp.files import write_whole
from mmitp.models.config_text import config_text
from mmitp.models.slim_config import FURTHER, is_masked, slim_config
from mmitp.pruning import MacBudget, MaskedLayer, SlimPlan, masked_layers
from mmitp.pruning.cost import Cost, make_cost
from mmitp.pruning.freeze import NotFinite
from mmitp.pruning.latency import Calibration, LatencyCost
from mmitp.pruning.live import plan_live
from mmitp.pruning.masks import weights_of
from mmitp.pruning.progressive import restore_cut, sizes_of_cut
from mmitp.pruning.pruner import InTrainPruner
from mmitp.pruning.rng import kept_rng
from mmitp.pruning.settings import (
    OUTCOME,
    check_settings,
    frozen_otherwise,
    layout_of_state,
    mask_layout,
    require_in_optimizer,
    require_same_layout,
)
from mmitp.registry import HOOKS
from mmitp.values import is_size, unlike

STATE_KEY = "mmitp_prune_hook"

#: Checkpoint of a run that was stopped before its masks froze.
STOPPED = "stopped.pth"

#: A latency budget is compared with the clock so many times in the window: some seconds each.
CALIBRATIONS = 10

#: The log says so many times in the window how far the masks have come.
PROGRESS = 10


@HOOKS.register_module()
class PruneHook(Hook):
    """When the pruner works, what is logged of it, and what goes into checkpoints.

    The model carries masks already (``model = dict(type='mmitp.MaskedModel', of=...)``); they are ordinary parameters
    of the config's optimizer (Optimizer 1: task loss and weight decay). While ``begin <= epoch < end`` an
    :class:`~mmitp.pruning.InTrainPruner` follows every optimizer step by Optimizer 2 of S2. At ``end`` the masks freeze
    at or under ``target``.

    Args:
        target: ``psi*``, fraction of the whole model's MACs (or other ``cost``) to keep, in (0, 1).
        b: weight of ``L_HW`` (S1: 10; 50 for a target of 0.2), or ``'auto'``, the default.
        begin, end: the window, in epochs (S1: 20 and 240 of 300), or in iterations with an iteration-based loop.
            Numbers below 1 with a decimal point are parts of the run (``begin=1/15, end=0.8`` are S1's), rounded to
            whole epochs or iterations.
        lr: learning rate of Optimizer 2 (S1: 0.01), SGD without momentum.
        interval: Optimizer 2 steps with every optimizer step (``'iter'``) or with the last of each epoch (``'epoch'``).
        on_miss: what to do if the masks end above the target: ``'project'`` switches the lowest ones off until it
            is met, ``'error'`` stops, ``'warn'`` freezes them as they are.
        fill: the freeze switches the best dropped channels back on up to within 1 % of the target.
        divisor: at the freeze every layer keeps a multiple of so many channels (8, 16), read and computed, or all it
            has: kernels work on that many at a time, and what lies between costs what the next multiple costs.
            ``'auto'``: 8 from 64 channels on, 4 from 32, 2 from 16, 1 below, so that narrow layers have a choice.
        input_shape: (H, W) the MACs are stated for; by default the size of the first training batch.
        slim_at_end: at ``end`` cut what the frozen masks drop out of the live model (weights, BatchNorm, averaged
            copies, optimizer state): the remaining epochs train the small network, with the masked one's losses up to
            rounding (see :mod:`mmitp.pruning.live`). Checkpoints hold the small network from then on; they resume, and
            ``<work_dir>/slim/config.py`` loads them like any config.
        cost: what ``target`` is a fraction of: ``'macs'``, ``'params'``, or measured latency,
            ``dict(type='latency', table='table.json', margin=0.1)`` with a table from ``mmitp profile``
            (see :class:`mmitp.pruning.latency.LatencyCost`). On the table's machine the run ends at or under the target
            by the clock: slimmed copies are timed beside the dense network ten times in the window and at the freeze
            (see :class:`mmitp.pruning.latency.Calibration`). On another one, where its times cannot be checked, the
            table less its margin is believed, and a warning says so.
        push: ``'plain'`` (the paper's; the default for a fixed ``b``), ``'balanced'`` (the default for ``'auto'``) or
            ``'fisher'`` (with ``'auto'`` alone).
        min_keep: part of its input channels that every layer keeps at least; 0 is one channel (the paper's).
        slim_every: progressive slimming, with ``slim_at_end``: inside the window, every so many epochs (iterations with
            an iteration-based loop; below 1 with a decimal point: parts of the window), what has been off for as long
            is cut out of the live model as at its end. Losses and ratio go on; what is cut does not come back (see
            :mod:`mmitp.pruning.progressive`). None: at the end alone.
        by_epoch: whether a loop by epochs counts the window, and ``slim_every``, in epochs. False: in iterations, for
            a window of less than an epoch.

    ``b``, ``lr``, ``push``, ``min_keep``, ``fill``, ``divisor`` and ``on_miss`` are
    :class:`~mmitp.pruning.InTrainPruner`'s.

    Raises:
        ValueError: an argument out of range; no masks in the model or the optimizer; the window does not fit the run;
            the target is below the cheapest reachable ratio; a resumed checkpoint has other masks, or masks frozen with
            other settings; a mask or a weight that is not finite. ``RuntimeError`` with ``on_miss='error'``.
    """

    # Before EMA (NORMAL, see before_run) averages and before checkpoints (VERY_LOW) are written.
    priority = "ABOVE_NORMAL"

    def __init__(
        self,
        target: float,
        b: float | str = "auto",
        begin: float = 20,
        end: float = 240,
        lr: float = 0.01,
        interval: str = "iter",
        on_miss: str = "project",
        fill: bool = True,
        divisor: int | str = 1,
        input_shape: Sequence[int] | None = None,
        slim_at_end: bool = False,
        cost: str | dict[str, Any] | Cost = "macs",
        push: str | None = None,
        min_keep: float = 0.1,
        slim_every: float | None = None,
        by_epoch: bool = True,
    ) -> None:
        try:
            check_settings(target, b, lr, 1, push, min_keep, divisor, on_miss)
        except ValueError as error:
            raise ValueError(f"PruneHook {error}") from None
        check_window(begin, end, slim_every)
        if interval not in ("iter", "epoch"):
            raise ValueError(f"PruneHook interval must be 'iter' or 'epoch', got {interval!r}")
        for name, flag in (("fill", fill), ("slim_at_end", slim_at_end), ("by_epoch", by_epoch)):
            if not isinstance(flag, bool):
                raise ValueError(f"PruneHook {name} must be True or False, got {flag!r}")
        if slim_every is not None and not slim_at_end:
            raise ValueError("PruneHook slim_every needs slim_at_end=True: it slims on the way there")
        self.slim_every = slim_every
        if input_shape is not None and not is_size(input_shape):
            raise ValueError(f"PruneHook input_shape must be two whole numbers of pixels (H, W), got {input_shape!r}")
        self.target, self.slim_at_end, self.interval = float(target), slim_at_end, interval
        self.window, self.by_epoch = (begin, end), by_epoch
        self.begin, self.end = begin, end  # in whole epochs or iterations once the run's length is known
        self.arguments: dict[str, Any] = dict(
            b=b, lr=lr, push=push, min_keep=min_keep, fill=fill, divisor=divisor, on_miss=on_miss
        )
        self.cost = make_cost(cost)
        self.input_shape = (int(input_shape[0]), int(input_shape[1])) if input_shape is not None else None
        self.channels: int | None = None  # of the images
        self.pruner: InTrainPruner | None = None
        #: spec and MACs of the slimmed network once it has taken the masked one's place; there is no pruner then
        self.slimmed: dict[str, Any] | None = None
        self.masks: dict[str, MaskedLayer] = {}
        self.calibration: Calibration | None = None
        self._pending: dict[str, Any] | None = None
        self._state: dict[str, Any] = {}  # the pruner's, once it is gone
        self._dense: nn.Module | None = None  # of a network resumed after a cut, until its budget is made
        self._best_rules: dict[CheckpointHook, Any] = {}
        self._steps_now = False
        self._window_since: tuple[int, float] | None = None  # steps done, and the time, as the window was entered
        self._at: dict[str, int] = {}  # the step at which something was last done

    @property
    def budget(self) -> MacBudget | None:
        """The model's budget, from the first iteration to the live slimming."""
        return None if self.pruner is None else self.pruner.budget

    @property
    def frozen(self) -> bool:
        """Whether the masks are fixed."""
        if self.pruner is not None:
            return self.pruner.frozen
        return self.slimmed is not None or bool(self.masks) and all(m.mask_frozen for m in self.masks.values())

    @property
    def steps(self) -> int:
        """Steps of Optimizer 2 done."""
        return self.pruner.count if self.pruner is not None else self._state.get("count", 0)

    # -- set-up

    def before_run(self, runner: Runner) -> None:
        """Stands before every EMAHook, whatever their priorities: mmpretrain's configs give theirs this one's."""
        average = next((hook for hook in runner._hooks if isinstance(hook, EMAHook)), None)
        if average is not None and runner._hooks.index(average) < runner._hooks.index(self):
            others = [hook for hook in runner._hooks if hook is not self]  # a new list: the Runner is going through it
            place = others.index(average)
            runner._hooks = [*others[:place], self, *others[place:]]

    def before_train(self, runner: Runner) -> None:
        self.logger = MMLogger.get_current_instance()
        self.runner = runner
        if sum(isinstance(hook, PruneHook) for hook in runner.hooks) > 1:
            raise ValueError("two PruneHooks in one run: each would move and freeze the other's masks, leave one out")
        self.masks = masked_layers(self._model(runner))
        if not self.masks and self.slimmed is None:
            raise ValueError(
                "PruneHook found no masks in the model. Compose the config with one more line: "
                "model = dict(type='mmitp.MaskedModel', of=<the model's type>)"
            )
        if self.slim_at_end and self.slimmed is None:
            require_slimmable(runner)
        self._check_window(runner)
        optimizer = self._optimizer(runner)
        require_in_optimizer(self.masks, optimizer)
        tell_groups(self.masks, optimizer, self.logger)
        self._spare_masks_from_clipping(runner.optim_wrapper)
        before, after = self._take_gradients, self._optimizer_2
        if runner.cfg.get("compile"):  # it traces the optimizer's step too; the host's half would be traced every time
            before, after = torch.compiler.disable(before), torch.compiler.disable(after)
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: before(optimizer)),
            optimizer.register_step_post_hook(lambda *_: after()),
        ]

    def _check_window(self, runner: Runner) -> None:
        run = RunLength.of(runner)
        self.by_iter = not (run.by_epoch and self.by_epoch)
        self.check_length(run)
        last, unit = run.counted(not self.by_iter)
        begin, end = self.begin, self.end = fit_window(*self.window, last, unit)
        self.length = 1 if self.by_iter else len(runner.train_dataloader)
        self.window_steps = max((end - begin) * self.length // self._accumulation(runner), 1)
        if self.interval == "epoch":
            self.window_steps = min(self.window_steps, end - begin)
        self.calibrate_every = max(self.window_steps // CALIBRATIONS, 1)
        after = "the slimmed network" if self.slim_at_end else "the network with fixed masks"
        rest = f", {after} in those from {end + 1} on" if end < last else ""
        self.logger.info(f"PruneHook: masks train in {unit} {begin + 1} to {end} of {last}{rest}")
        if self._pending is not None:
            self._require_same_outcome(self._pending)
            if isinstance(self.cost, LatencyCost) and self._state.get("counted") is not None:
                self.cost.counted = self._state["counted"]

    def check_length(self, run: RunLength) -> list[str]:
        """Whether the window fits a run; nothing to be told of if it does.

        Raises:
            ValueError: it is empty or ends after the run; ``interval='epoch'`` where iterations are counted.
        """
        by_epoch = run.by_epoch and self.by_epoch
        fit_window(*self.window, *run.counted(by_epoch))
        if not by_epoch and self.interval == "epoch":
            raise ValueError(
                "PruneHook interval='epoch' needs a loop by epochs and by_epoch=True; with iterations use 'iter'"
            )
        return []

    @staticmethod
    def _accumulation(runner: Runner) -> int:
        return int(getattr(runner.optim_wrapper, "_accumulative_counts", 1))

    def _optimizer(self, runner: Runner) -> torch.optim.Optimizer:
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict) or not isinstance(wrapper, OptimWrapper):
            raise ValueError(f"PruneHook needs a single OptimWrapper, got {type(wrapper).__name__}")
        return wrapper.optimizer

    def _spare_masks_from_clipping(self, wrapper: OptimWrapper) -> None:
        """Clipping by norm sees the weights only: mask gradients neither count in the norm nor are scaled."""
        clip = getattr(wrapper, "clip_func", None)
        if clip is None:
            return
        ids = {id(layer.prune_mask) for layer in self.masks.values()}
        wrapper.clip_func = lambda params, **kw: clip([p for p in params if id(p) not in ids], **kw)

    def _build_pruner(self, runner: Runner, data_batch: Any) -> None:
        model = self._model(runner)
        # Of a network that is resumed after a cut: the dense one that the budget is about.
        dense = model if self._dense is None else self._dense
        example = example_inputs(model, data_batch, self.input_shape)
        shape = torch.tensor(example["inputs"].shape[-2:])
        broadcast(shape)  # batches of different sizes in different processes, but one budget
        self.input_shape = (int(shape[0]), int(shape[1]))
        if example["inputs"].shape[-2:] != self.input_shape:
            example = example_inputs(model, data_batch, self.input_shape)
        self.channels = example["inputs"].shape[1]
        budget = MacBudget(dense, example, cost=self.cost)
        self.logger.info(
            f"PruneHook: {budget.dense_macs / 1e9:.4f} GMACs dense, {len(budget.masked)} of "
            f"{len(budget.layers)} layers masked, target {self.target} of the {budget.what}"
        )
        for name, why in budget.unfollowed.items():
            self.logger.warning(f"PruneHook: {name}: {why}")
        ratio = budget.kept_cost() / budget.dense_cost
        if self.frozen and not getattr(runner, "_resume", False):
            found = f"the masks of load_from are frozen at {ratio:.4f} of the {budget.what}"
            if ratio > self.target:
                self.logger.info(f"PruneHook: {found}, above the target {self.target}: they train again, from there")
                for layer in self.masks.values():
                    layer.unfreeze_mask()
                budget.hold_masks()
            else:
                self._warn(
                    f"{found}, which meets the target {self.target}: they stay as they are, and no mask trains in this "
                    "run. A lower target prunes further"
                )
        started = runner._load_from if not getattr(runner, "_resume", False) else None
        if started and not self.frozen and self.arguments["push"] is None and self.arguments["b"] == "auto":
            self.logger.info(
                f"PruneHook: the run starts from {started}. Where that is the trained dense network, push='fisher' in "
                "a short window has lost less than the default (docs/prune.md, From a trained checkpoint)"
            )
        cut = self._state.get("cut") if self._pending is not None else None
        if cut is not None:
            restore_cut(dense, budget, cut)
            budget.move_to(dense, model)
            self._dense = None
        try:
            self.pruner = InTrainPruner(
                model,
                example,
                self.target,
                steps=self.window_steps,
                budget=budget,
                slim_every=self._steps_between_cuts(runner),
                warn=self._warn,
                **self.arguments,
            )
        except ValueError as error:
            raise ValueError(f"PruneHook {error}") from None
        if self._pending is not None:
            self.pruner.load_state_dict(self._pending["pruner"])
            self._pending = None
        if self.slim_at_end and cut is None:  # a network that was cut has been looked at by the run that cut it
            require_same_training(model, example, data_batch)
        if isinstance(self.cost, LatencyCost) and not self.frozen:
            blank = blank_example(model, self.input_shape, example["inputs"].shape[1], self.cost.table.get("batch", 1))
            divisor, min_keep = self.arguments["divisor"], self.arguments["min_keep"]
            self.calibration = calibration(model, blank, budget, self.cost, self.target, self._warn, divisor, min_keep)
            self.pruner.clock = self.calibration

    def _steps_between_cuts(self, runner: Runner) -> int | None:
        """``slim_every`` in steps of Optimizer 2."""
        if self.slim_every is None:
            return None
        if is_part(self.slim_every):
            return max(round(self.slim_every * self.window_steps), 1)
        each = 1 if self.interval == "epoch" else self.length / self._accumulation(runner)
        return max(round(self.slim_every * each), 1)

    def _warn(self, text: str) -> None:
        self.logger.warning(f"PruneHook: {text}")

    def _ratio(self) -> float:
        if self.slimmed is not None:
            return self.slimmed["ratio"]
        assert self.pruner is not None
        return self.pruner.ratio()

    # -- the window

    def _in_window(self) -> bool:
        now = self.runner.iter if self.by_iter else self.runner.epoch
        return self.begin <= now < self.end and not self.frozen

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.slimmed is not None:
            return
        if self.pruner is None:
            self._build_pruner(runner, data_batch)
        assert self.pruner is not None
        now = runner.iter if self.by_iter else runner.epoch
        if not self.frozen and now >= self.end:
            self._warn(f"training goes on at {now}, past the window's end, with masks not frozen")
            self._freeze(runner, runner.iter)
        if self.slim_at_end and self.frozen:
            self._slim(runner)  # resumed from a checkpoint with frozen masks
            return
        if self.pruner.cut_is_due:
            self._cut(runner)
        self._steps_now = self._in_window() and (self.interval == "iter" or self._is_last_update(runner, batch_idx))
        self.pruner.active = self._steps_now
        if self._steps_now and self.calibration is not None and self._is_new(self.calibrate_every, "calibrated"):
            if self.calibration.calibrate():
                self._tell_clock()

    def _is_new(self, every: int, what: str) -> bool:
        """Whether a step that is a multiple of ``every`` has just been reached: accumulation stays at one for some
        iterations."""
        assert self.pruner is not None
        position = self.pruner.position
        if position % every or self._at.get(what) == position:
            return False
        self._at[what] = position
        return True

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

    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if self.pruner is not None:
            self.pruner.take_gradients(optimizer)

    def _optimizer_2(self) -> None:
        if self.pruner is not None:
            try:
                self.pruner.step()
            except NotFinite as error:
                then = self.runner.iter + 1 - error.ago * self._accumulation(self.runner)
                raise ValueError(f"PruneHook: in iteration {then} {error}") from None

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if self._is_logged(runner, batch_idx):
            self._log(runner)
        if self._steps_now and self.pruner is not None:
            self._tell_progress(self.pruner.position)
        if self.by_iter and not self.frozen and runner.iter + 1 >= self.end:
            self._freeze(runner, runner.iter + 1)
            if self.slim_at_end:
                outputs = outputs or {}
                outputs.update({key: value.detach() for key, value in outputs.items()})  # lets go of the graph
                self._slim(runner)

    def _is_logged(self, runner: Runner, batch_idx: int) -> bool:
        """Whether a LoggerHook may write in this iteration. In the others nobody waits for the ratio."""
        intervals = [hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)]
        due = any(self.every_n_inner_iters(batch_idx, n) for n in intervals)
        return due or self.end_of_epoch(runner.train_dataloader, batch_idx) or runner.iter + 1 == runner.max_iters

    def _log(self, runner: Runner) -> None:
        ratio, hub = self._ratio(), runner.message_hub
        hub.update_scalar("train/ops_kept", ratio)
        hub.update_scalar("train/L_HW", max(ratio - self.target, 0.0))
        if self._steps_now and self.pruner is not None:
            seen, path = self.pruner.forecast.seen, self.pruner.path
            hub.update_scalar("train/mask_distance", seen[-1][1] if seen else 0.0)
            if path is not None:
                if self.pruner.push != "fisher":  # an order over the network, in which masks go: no b says how far
                    hub.update_scalar("train/b", float(path.push) / self.pruner.lr)
                hub.update_scalar("train/ops_path", path.wanted(self.pruner.position - 1))

    def _tell_progress(self, done: int) -> None:
        """The share kept, the target and the time left to the freeze."""
        now = time.perf_counter()
        if self._window_since is None:
            self._window_since = done, now
        since, start = self._window_since
        if done == since or not self._is_new(max(self.window_steps // PROGRESS, 1), "told"):
            return
        left = timedelta(seconds=round((now - start) / (done - since) * max(self.window_steps - done, 0)))
        assert self.budget is not None
        self.logger.info(
            f"PruneHook: masks train, step {done} of {self.window_steps}: {self._ratio():.4f} of the "
            f"{self.budget.what}, target {self.target}; they freeze in about {left}"
        )

    def after_train_epoch(self, runner: Runner) -> None:
        if not self.by_iter and not self.frozen and runner.epoch + 1 >= self.end:
            if self.pruner is None:  # resumed from a checkpoint of the epoch's last iteration
                with kept_rng():
                    self._build_pruner(runner, next(iter(runner.train_dataloader)))
            self._freeze(runner, runner.iter)
            if self.slim_at_end:
                self._slim(runner)

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        if not self.frozen and self.pruner is not None:
            self.logger.warning(
                "PruneHook: training stopped before the window's end; the masks freeze now, after the last save: "
                f"{os.path.join(runner.work_dir, STOPPED)} holds the outcome"
            )
            self._freeze(runner, runner.iter)
            if self.slim_at_end:
                self._slim(runner)
            done = dict(epoch=runner.epoch, iter=runner.iter)
            runner.save_checkpoint(runner.work_dir, STOPPED, meta=done, by_epoch=not self.by_iter)

    # -- the freeze

    def _freeze(self, runner: Runner, done: int) -> None:
        """``done``: steps of the training so far; ``runner.iter`` counts an iteration once its hooks are through."""
        assert self.pruner is not None
        model = self._model(runner)
        try:
            with without_runner_hooks(model):
                report = self.pruner.freeze()
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"PruneHook: {error}") from None
        self._steps_now = False
        self._sync_ema(runner)
        tell_ratio(report, self.logger)
        if self.calibration is not None:
            self._tell_clock()
            if self.arguments["on_miss"] == "project" and self.calibration.clock > self.target:
                self._warn(
                    f"the target {self.target} is missed by the clock: even the cheapest network the masks "
                    f"allow takes {self.calibration.clock:.4f} of the dense latency, whatever its table says"
                )
        tell_freeze(report, runner, done, self.logger)

    def _cut(self, runner: Runner) -> None:
        """Progressive slimming, between two iterations."""
        assert self.pruner is not None
        model = self._model(runner)
        before = sum(p.numel() for _, p in weights_of(model))
        self._sync_ema(runner)
        with without_runner_hooks(model):
            gone = self.pruner.cut(shrink=lambda plan: slim_runner(runner, plan, keep_masks=True))
        if gone:
            self.logger.info(
                f"PruneHook: {gone} mask entries that were off are cut out of the network, {before} -> "
                f"{sum(p.numel() for _, p in weights_of(model))} parameters at the same {self._ratio():.4f} of the "
                f"{self.pruner.budget.what}"
            )

    def _slim(self, runner: Runner) -> None:
        assert self.pruner is not None
        model, budget = self._model(runner), self.pruner.budget
        params = budget.dense_params
        with without_runner_hooks(model):
            plan = plan_live(model, self.pruner.example, budget, self.pruner.more_examples)
        macs = dict(macs_dense=budget.dense_macs, macs_kept=budget.kept_macs())
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
        if self.pruner is not None:
            self._state = dict(self.pruner.state_dict(), cut=None)  # the spec says it all from now on
            self.pruner.detach()
        self.slimmed, self.pruner, self.masks, self.calibration = slim, None, {}, None
        if is_main_process() and is_masked(runner.cfg.get("model", {})):
            try:
                text = config_text(slim_config(runner.cfg, plan))
            except ValueError as error:  # the training goes on without it
                MMLogger.get_current_instance().warning(f"PruneHook: no slim/config.py is written: {error}")
            else:
                write_whole(os.path.join(runner.work_dir, "slim", "config.py"), text)

    # -- evaluation and checkpoints

    def before_val_epoch(self, runner: Runner) -> None:
        self._sync_ema(runner)
        if (within := self._is_within()) is None:
            return
        # 'best' is only kept from models within the budget.
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.save_best:
                self._best_rules[hook] = hook.save_best
        for hook, rule in self._best_rules.items():
            hook.save_best = rule if within else None

    def _is_within(self) -> bool | None:
        """Whether the model is within the budget; None outside of a training."""
        if self.frozen:
            return True
        if self.pruner is not None:
            return self._ratio() <= self.target
        # A resumed run may validate before its first iteration, by which the budget is made.
        return None if self._pending is None else self._pending.get("within") is True

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._sync_ema(runner)
        self._require_finite_weights(runner)
        checkpoint[STATE_KEY] = dict(
            input_shape=self.input_shape,
            channels=self.channels,
            window=[self.begin, self.end],
            by_iter=self.by_iter,
            interval=self.interval,
            slimmed=self.slimmed,
            within=self._is_within(),
            pruner=self._state if self.pruner is None else self.pruner.state_dict(),
        )

    def _require_finite_weights(self, runner: Runner) -> None:
        """A poisoned network is never saved over a good one."""
        bad = [n for n, p in self._model(runner).named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            raise ValueError(
                f"PruneHook: after iteration {runner.iter} {bad[0]!r} holds values that are not finite ({len(bad)} "
                "parameters in all): nothing is saved. Go back to the last checkpoint, and lower the learning rate or "
                "clip the gradients"
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(STATE_KEY, {})
        pruner = dict(settings={}, frozen=False, layout={}, count=0) if "pruner" in state else None
        if state and (problem := unlike(state, dict(window=[0.0], pruner=pruner), STATE_KEY)):
            raise ValueError(f"{runner._load_from}: {problem}")
        resume = getattr(runner, "_resume", False)
        if (slim := state.get("slimmed")) and self.slimmed is None:
            if isinstance(runner._train_loop, BaseLoop) and not resume:
                raise ValueError(
                    "load_from names a checkpoint of a slimmed network, which fits no masked one: resume it, or train "
                    f"on with the slim/config.py beside it; {FURTHER}"
                )
            # Before EMA's hook loads its copy, and before the Runner loads model and optimizer.
            self._become(runner, SlimPlan.from_spec(slim["spec"]), slim)
            self.input_shape, self.channels = state["input_shape"], state.get("channels")
        elif not slim and (cut := state.get("pruner", {}).get("cut")) is not None and self._dense is None:
            if isinstance(runner._train_loop, BaseLoop) and not resume:
                raise ValueError(
                    "load_from names a checkpoint from inside the window of a run with slim_every, whose network is "
                    "smaller than the dense one already: resume it"
                )
            if problem := unlike(cut, dict(spec=dict(layers={}, norms={})), f"{STATE_KEY}.pruner.cut"):
                raise ValueError(f"{runner._load_from}: {problem}")
            with without_runner_hooks(model := self._model(runner)):
                self._dense = copy.deepcopy(model)
            try:
                plan = sizes_of_cut(model, cut)
            except ValueError as error:
                raise ValueError(f"{runner._load_from}: {error}") from None
            slim_runner(runner, plan, keep_masks=True)
        if resume and not slim:
            # Before the Runner loads them: what does not fit is said in its own words.
            saved = {re.sub(r"^module\.", "", key): value for key, value in checkpoint["state_dict"].items()}
            model = self._model(runner)
            require_same_layout(layout_of_state(saved, model), mask_layout(model))
        if resume and state:
            if "pruner" not in state:
                raise ValueError(
                    f"{runner._load_from} was written by an earlier version of mmitp, whose pruning state cannot be "
                    "resumed: start a new run from its weights (load_from instead of resume)"
                )
            self._pending = state
            self._state = state["pruner"]
            self.input_shape = self.input_shape or state["input_shape"]
            self.channels = state.get("channels")

    def _require_same_outcome(self, state: dict[str, Any]) -> None:
        """A resumed run whose masks are frozen cannot freeze them otherwise.

        Raises:
            ValueError: target, window or another setting that decided on the pattern differs from the checkpoint's.
        """
        then, window = state["pruner"].get("settings", {}), [self.begin, self.end]
        now = dict(self.arguments, target=self.target)
        changed = {
            key: (then[key], now[key]) for key in OUTCOME if key in then and key in now and then[key] != now[key]
        }
        if state["window"] != window:
            changed["(begin, end)"] = (tuple(state["window"]), tuple(window))
        if (before := state.get("by_iter", self.by_iter)) != self.by_iter:
            changed["by_epoch"] = (not before, not self.by_iter)
        if not changed:
            return
        if state["pruner"]["frozen"]:
            raise ValueError(f"PruneHook: {frozen_otherwise(changed)}")
        if {"(begin, end)", "by_epoch"} & changed.keys():
            units = ["iterations" if by_iter else "epochs" for by_iter in (before, self.by_iter)]
            self._warn(
                f"the checkpoint's window was {state['window']} {units[0]}, from now on it is {window} {units[1]}"
            )

    def _sync_ema(self, runner: Runner) -> None:
        """The averaged model prunes what the trained one prunes: averages of masks would drift apart."""
        source = getattr(self, "masks", None)
        if source is None:
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                for name, layer in masked_layers(hook.ema_model.module).items():
                    layer.prune_mask.data.copy_(source[name].prune_mask.data)
                    layer.set_pattern(source[name].prune_pattern)

    @staticmethod
    def _model(runner: Runner) -> nn.Module:
        return unwrap(runner.model)
