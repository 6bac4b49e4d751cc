"""The pruning window, PruneHook's ``begin`` and ``end``, in epochs or iterations of a run."""

from __future__ import annotations


def is_part(value: float) -> bool:
    """Whether a bound is a part of the run, and no number of epochs or iterations."""
    return isinstance(value, float) and 0 < value < 1


def whole_units(bound: float, length: int) -> int:
    """A bound in whole epochs or iterations of a run of so many; a part of the run is at least one."""
    return max(round(bound * length), 1) if is_part(bound) else int(bound)
