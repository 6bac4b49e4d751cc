"""What a value from a config, a file or the command line may be. Only the standard library is imported here."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

__all__ = ["is_count", "is_number", "is_size"]


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a finite number (``True`` is none, nor is ``'1'``), and not below ``least``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number: Any = value
    try:
        return math.isfinite(number) and bool(number >= least)
    except OverflowError:  # a whole number that no float holds
        return False


def is_count(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number, and not below ``least``; 2.0 is none."""
    return isinstance(value, Integral) and is_number(value, least)


def is_size(value: Any) -> bool:
    """Whether it is the size (H, W) of an image in pixels: two whole numbers of at least 1."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value))
