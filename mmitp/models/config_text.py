"""A config as the text of a file."""

from __future__ import annotations

import keyword
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmengine import Config

#: columns up to which a dict or list stands in one line
_WIDTH = 100


def type_name(kind: Any) -> str:
    """A config's ``type`` as a string; configs of mmengine's newer style hold the class itself."""
    return f"{kind.__module__}.{kind.__qualname__}" if hasattr(kind, "__qualname__") else str(kind)


def config_text(cfg: Config) -> str:
    """A config as the text of a file that reads as the same config.

    mmengine's ``pretty_text`` is not for all: infinities, paths and classes stand there as names that nobody defines.

    Raises:
        ValueError: a value that no text stands for (a tensor, a function), with its key.
    """
    return "".join(f"{key} = {_written(value, str(key))}\n" for key, value in cfg.to_dict().items())


def _written(value: Any, where: str, indent: str = "") -> str:
    """A value as it stands in a config file, in one line where it is short."""
    if isinstance(value, Mapping):
        by_name = all(isinstance(k, str) and k.isidentifier() and not keyword.iskeyword(k) for k in value)
        inner = [(k if by_name else repr(k), _written(v, f"{where}.{k}", indent + "    ")) for k, v in value.items()]
        brackets, link = (("dict(", ")"), "=") if by_name else (("{", "}"), ": ")
        parts = [f"{k}{link}{v}" for k, v in inner]
    elif isinstance(value, (list, tuple)):
        brackets = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
        parts = [_written(item, f"{where}.{i}", indent + "    ") for i, item in enumerate(value)]
    else:
        return _scalar(value, where)
    line = brackets[0] + ", ".join(parts) + brackets[1]
    if len(indent) + len(line) <= _WIDTH and "\n" not in line:
        return line
    lines = "".join(f"\n{indent}    {part}," for part in parts)
    return f"{brackets[0]}{lines}\n{indent}{brackets[1].lstrip(',')}"


def _scalar(value: Any, where: str) -> str:
    if isinstance(value, float):  # NumPy's too, whose own text differs
        return float.__repr__(value) if math.isfinite(value) else f"float('{float(value)}')"
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if hasattr(value, "__qualname__"):  # a registry takes a class or function by its path
        if getattr(value, "__module__", None) == "builtins":
            return value.__name__
        if where.endswith((".type", ".of")):
            return repr(type_name(value))
    if value is None or isinstance(value, (bool, int, str, bytes, complex, range, slice, set, frozenset)):
        return repr(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    shown = " ".join(repr(value).split())
    shown = shown[:77] + "..." if len(shown) > 80 else shown
    raise ValueError(
        f"the config cannot be written to a file: {where} is {shown} ({type(value).__name__}), which no text of a "
        "config stands for. Give it as a number, a name, or a list of them"
    )
