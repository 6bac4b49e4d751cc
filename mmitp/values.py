"""What a value from a config, a file or the command line may be. Only the standard library is imported here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

__all__ = ["is_count", "is_number", "is_size", "unlike"]


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a finite number (``True`` is none, nor is ``'1'``), and not below ``least``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number: Any = value
    try:
        return math.isfinite(number) and bool(number >= least)
    except OverflowError:  # a whole number that no float holds
        return False


def is_count(value: Any, least: float = 1) -> bool:
    """Whether it is a whole number, and not below ``least``; 2.0 is none."""
    return isinstance(value, Integral) and is_number(value, least)


def is_size(value: Any) -> bool:
    """Whether it is the size (H, W) of an image in pixels: two whole numbers of at least 1."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value))


def unlike(value: Any, example: Any, where: str) -> str:
    """What a saved state has otherwise than a state of the present program, if anything does.

    Dictionaries must have the example's keys, lists entries like its first one, tuples entries like its own, tensors
    its shape. Where the example is ``None`` anything may stand; for a dictionary or a tensor ``None`` may.

    Args:
        value: from a file.
        example: such a state as the program itself would save.
        where: the value's name.

    Returns:
        A clause that begins with the name of the first difference; nothing where there is none.
    """
    shape = getattr(example, "shape", None)
    if example is None or value is None and (isinstance(example, Mapping) or shape is not None):
        return ""
    if isinstance(example, Mapping):
        if not isinstance(value, Mapping):
            return f"{where} must be a dictionary, got {_shown(value)}"
        if lacking := [key for key in example if key not in value and example[key] is not None]:
            return f"{where} lacks {lacking[0]!r}"
        found = (unlike(value.get(key), inner, f"{where}.{key}") for key, inner in example.items())
        return next(filter(None, found), "")
    if isinstance(example, tuple) and isinstance(value, (list, tuple)) and len(value) == len(example):
        pairs = enumerate(zip(value, example, strict=True))
        return next(filter(None, (unlike(v, inner, f"{where}[{i}]") for i, (v, inner) in pairs)), "")
    if isinstance(example, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            return f"{where} must be a list, got {_shown(value)}"
        if isinstance(example, tuple):
            return f"{where} must have {len(example)} entries, got {len(value)}"
        inner = example[0] if example else None
        return next(filter(None, (unlike(v, inner, f"{where}[{i}]") for i, v in enumerate(value))), "")
    if shape is not None:
        same = getattr(value, "shape", None) == shape
        return "" if same else f"{where} must be a tensor of shape {tuple(shape)}, got {_shown(value)}"
    kinds: dict[type, tuple[str, bool]] = {
        bool: ("True or False", isinstance(value, bool)),
        int: ("a whole number", is_count(value, -(2**63))),
        float: ("a finite number", is_number(value)),
        str: ("text", isinstance(value, str)),
    }
    what, fits = kinds.get(type(example), ("", True))
    return "" if fits else f"{where} must be {what}, got {_shown(value)}"


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    text = repr(value) if shape is None else f"a tensor of shape {tuple(shape)}"
    return text if len(text) < 80 else text[:77] + "..."
