"""The pruning window, PruneHook's ``begin`` and ``end``, in epochs or iterations of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_part(value: float) -> bool:
    """Whether a bound is a part of the run, and no number of epochs or iterations."""
    return isinstance(value, float) and 0 < value < 1


def whole_units(bound: float, length: int) -> int:
    """A bound in whole epochs or iterations of a run of so many; a part of the run is at least one."""
    return max(round(bound * length), 1) if is_part(bound) else int(bound)


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
