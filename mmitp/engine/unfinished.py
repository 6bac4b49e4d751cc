"""What a checkpoint leaves to be done of its epoch: the rest of its batches, and a validation.

mmengine saves before it validates, and counts a resumed epoch's batches from the first one. So a run that is resumed
would train some batches twice, and lack a validation that learning rates (ReduceOnPlateau), the best checkpoint and
early stopping go by.
"""

from __future__ import annotations

import copy
from typing import Any

from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from mmitp.engine.window import require_batches
from mmitp.values import is_number, unlike

__all__ = ["KEY", "GoOn", "Progress"]

#: Where a checkpoint keeps it.
KEY = "mmitp_progress"


class Progress(Hook):
    """Keeps in checkpoints how much of the epoch is done, what was validated last, and early stopping's patience."""

    priority = "VERY_HIGH"  # before CheckpointHook

    def __init__(self) -> None:
        self.batches = 0  # of the present epoch, trained; 0 between epochs
        self.validated = -1  # iterations done as the last validation ended
        self.metrics: dict[str, float] = {}  # of a validation that is being judged

    def before_train(self, runner: Runner) -> None:
        """Refuses a run without a batch."""
        require_batches(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Counts."""
        self.batches = batch_idx + 1

    def after_train_epoch(self, runner: Runner) -> None:
        """Nothing is left of this one."""
        self.batches = 0

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Takes note."""
        if isinstance(runner._train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            self.validated, self.metrics = runner.iter, metrics or {}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Adds all this."""
        patience = [self._patience(runner, hook) for hook in _stoppers(runner)]
        checkpoint[KEY] = dict(batches=self.batches, validated=self.validated, patience=patience)

    def _patience(self, runner: Runner, stopper: EarlyStoppingHook) -> tuple[float, int]:
        """Best score and validations waited. CheckpointHook saves once more where it finds a best one, in the midst."""
        savers = [place for place, hook in enumerate(runner.hooks) if isinstance(hook, CheckpointHook)]
        if stopper.monitor in self.metrics and savers and runner.hooks.index(stopper) > savers[0]:
            stopper = copy.copy(stopper)
            stopper._check_stop_condition(self.metrics[stopper.monitor])
        return float(stopper.best_score), int(stopper.wait_count)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Goes on from there; weights alone bring none of it.

        Raises:
            ValueError: it is no such state.
        """
        if not getattr(runner, "_resume", False) or KEY not in checkpoint:
            return
        state = checkpoint[KEY]
        problem = unlike(state, dict(batches=0, validated=0, patience=[(None, 0)]), KEY)
        if not problem and (strange := [best for best, _ in state["patience"] if not _is_score(best)]):
            problem = f"{KEY}.patience must hold numbers, got {strange[0]!r}"
        if problem:
            raise ValueError(f"{runner._load_from}: {problem}")
        self.batches, self.validated = state["batches"], state["validated"]
        for hook, (best, waited) in zip(_stoppers(runner), state["patience"], strict=False):
            hook.best_score, hook.wait_count = best, waited


class GoOn(Hook):
    """Does, as a resumed run begins, what was left: passes over the batches that are trained, and validates.

    Args:
        progress: what was done.
    """

    priority = "LOWEST"  # the other hooks are ready then

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def before_train(self, runner: Runner) -> None:
        """See the class."""
        loop, progress = runner.train_loop, self._progress
        if not getattr(runner, "_resume", False):
            return
        if isinstance(loop, EpochBasedTrainLoop) and progress.batches > 0:
            runner.logger.info(f"{progress.batches} batches of epoch {runner.epoch + 1} are trained: passed over")
            _pass_over(loop, progress.batches)
        elif _to_be_validated(runner) and progress.validated != runner.iter:
            runner.logger.info("the checkpoint is from before its validation, which follows")
            runner.val_loop.run()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """All have judged."""
        self._progress.metrics = {}


def _pass_over(loop: EpochBasedTrainLoop, batches: int) -> None:
    """Lets the loop take so many batches without training on them."""

    def run_iter(idx: int, data_batch: Any) -> None:
        if idx + 1 >= min(batches, len(loop.dataloader)):
            del vars(loop)["run_iter"]  # the next ones train

    vars(loop)["run_iter"] = run_iter


def _to_be_validated(runner: Runner) -> bool:
    """Whether the loops of mmengine would validate after what is done."""
    loop: Any = runner.train_loop
    if runner.val_loop is None:
        return False
    if isinstance(loop, EpochBasedTrainLoop):
        done, length = loop.epoch, loop.max_epochs
    elif isinstance(loop, IterBasedTrainLoop):
        done, length = loop.iter, loop.max_iters
    else:
        return False
    loop._decide_current_val_interval()
    return done >= max(loop.val_begin, 1) and (done % loop.val_interval == 0 or done == length)


def _stoppers(runner: Runner) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _is_score(value: Any) -> bool:
    return is_number(value) or value in (float("inf"), -float("inf"))
