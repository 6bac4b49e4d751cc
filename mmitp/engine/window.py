"""The pruning window, PruneHook's ``begin`` and ``end``, in epochs or iterations of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mmengine.runner import IterBasedTrainLoop, Runner

from mmitp.values import is_count, is_number


class RunLength(NamedTuple):
    """How long a run is. Hooks with a window look at this alone, so that a dry run can ask them about the real run."""

    by_epoch: bool  # its loop counts epochs
    epochs: int
    iterations: int

    @classmethod
    def of(cls, runner: Runner) -> RunLength:
        """That of a run about to start.

        Raises:
            ValueError: as :func:`require_batches`.
        """
        require_batches(runner)
        return cls(not isinstance(runner.train_loop, IterBasedTrainLoop), runner.max_epochs, runner.max_iters)

    def counted(self, by_epoch: bool) -> tuple[int, str]:
        """The run's length in epochs or iterations, and that unit's name."""
        return (self.epochs, "epochs") if by_epoch else (self.iterations, "iterations")


def require_batches(runner: Runner) -> None:
    """Refuses a run whose data set is smaller than the one batch that it would have to fill.

    Raises:
        ValueError: with the numbers.
    """
    loader = runner.train_dataloader
    try:
        batches, images = len(loader), len(loader.dataset)
    except TypeError:  # a stream, which has no length
        return
    if not batches:
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        raise ValueError(
            f"train_dataloader gives no batch: its data set has {images} images, and with drop_last=True a batch is "
            f"{size}. Lower train_dataloader.batch_size, or set train_dataloader.drop_last=False"
        )


def is_part(value: float) -> bool:
    """Whether a bound is a part of the run, and no number of epochs or iterations."""
    return isinstance(value, float) and 0 < value < 1


def whole_units(bound: float, length: int) -> int:
    """A bound in whole epochs or iterations of a run of so many; a part of the run is at least one."""
    return max(round(bound * length), 1) if is_part(bound) else int(bound)


def check_window(begin: float, end: float, slim_every: float | None) -> None:
    """Refuses what no run's window can be.

    Raises:
        ValueError: a bound or an interval out of range.
    """
    if not (is_number(begin, 0) and is_number(end, 0)) or is_part(begin) == is_part(end) and begin >= end:
        raise ValueError(f"PruneHook needs 0 <= begin < end, got begin={begin!r}, end={end!r}")
    for name, value in (("begin", begin), ("end", end)):
        if value != int(value) and not is_part(value):
            raise ValueError(f"PruneHook {name} must be whole, or a part of the run below 1, got {value}")
    if slim_every is None:
        return
    if not (is_number(slim_every) and slim_every > 0 and (is_part(slim_every) or is_count(slim_every))):
        raise ValueError(
            "PruneHook slim_every must be a whole number of epochs (or iterations), or a part of the window below 1, "
            f"got {slim_every!r}"
        )


def fit_window(begin: float, end: float, length: int, unit: str) -> tuple[int, int]:
    """PruneHook's window in whole units of a run of so many.

    Raises:
        ValueError: it is empty, or ends after the run.
    """
    first, last = whole_units(begin, length), whole_units(end, length)
    if last > length:
        early = max(round(length / 15), 1)
        raise ValueError(
            f"PruneHook's window ends after {last} {unit}, but the run stops at {length}. The recommended window is "
            f"begin={early}, end={max(length // 3, early + 1)}, the paper's begin={early}, end={length * 4 // 5}"
        )
    if first >= last:
        raise ValueError(f"PruneHook's window from {first} to {last} {unit} is empty: the run has {length} in all")
    return first, last


def run_window(hook: Mapping[str, Any], loop: Mapping[str, Any], epoch_steps: float) -> tuple[int, int, float]:
    """A run's window as its config gives it: begin, end, and the steps that one unit of theirs takes.

    Args:
        hook: PruneHook's config.
        loop: ``train_cfg``.
        epoch_steps: steps an epoch, of a loop by epochs.
    """
    by_epoch = loop.get("by_epoch", True) and "max_iters" not in loop
    length, unit = (loop.get("max_epochs", 0), epoch_steps) if by_epoch else (loop.get("max_iters", 0), 1.0)
    if by_epoch and not hook.get("by_epoch", True):
        length, unit = round(length * epoch_steps), 1.0
    return whole_units(hook.get("begin", 20), length), whole_units(hook.get("end", 240), length), unit
