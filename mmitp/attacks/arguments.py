"""What may be asked of an attack: one place for the checks of every attack, of the hook and of the evaluation."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Literal, get_args

from torch import Tensor

from mmitp.values import is_count, is_number

Amount = float | Tensor
Norm = Literal["linf", "l2"]

# Published sizes are 0.5 to 32 pixels/255 for l-inf, and 64 to 765 (0.25 to 3 in units of the full range) for l2.
_SMALLEST: dict[str, float] = {"linf": 0.1, "l2": 5.0}


def check_arguments(
    *,
    eps: Amount,
    alpha: Amount | None = None,
    low: Amount | None = None,
    high: Amount | None = None,
    steps: int = 1,
    restarts: int = 1,
    random_start: bool = True,
    noise: float = 0.0,
    norm: str = "linf",
) -> None:
    """Refuse values that make no attack; every comparison is one that NaN fails.

    Tensors are checked wherever they live, value by value; for one on an accelerator that means waiting for it.

    Args:
        eps: size, finite and not negative.
        alpha: step, finite, positive wherever ``eps`` is (unless there are no ``steps``); ``None``: there is none.
        low: smallest allowed value of an image, at most ``high``; either may be infinite to leave its side open.
        high: largest.
        steps: at least 0.
        restarts: at least 1, and 1 without a random start.
        random_start: whether runs begin at a random point.
        noise: finite and not negative.
        norm: ``"linf"`` or ``"l2"``.

    Raises:
        ValueError: naming the argument, its value and what it may be.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")
    for name, count, least in (("steps", steps, 0), ("restarts", restarts, 1)):
        if not is_count(count, least):
            raise ValueError(f"{name} must be a whole number, at least {least}, got {count!r}")
    if restarts > 1 and not random_start:
        raise ValueError("restarts without a random start repeat one run: set restarts=1 or random_start=True")
    _check_size("noise", noise)
    eps = _check_size("eps", eps)
    if alpha is not None:
        alpha = _check_size("alpha", alpha)
        if steps and not _all((alpha > 0) | (eps == 0)):
            raise ValueError(
                f"alpha, the length of a step, must be positive where eps is, got alpha={_show(alpha)} with "
                f"eps={_show(eps)}: a step of 0 attacks nothing"
            )
    if low is not None and high is not None:
        low, high = _on_host("low", low), _on_host("high", high)
        if not (_all(low <= high) and _all(low < math.inf) and _all(high > -math.inf)):
            raise ValueError(
                f"low and high, the smallest and the largest value of an image, must be numbers with low <= high, got "
                f"low={_show(low)}, high={_show(high)}"
            )


def check_pixels(
    *, eps: float, alpha: float | None = None, norm: str = "linf", steps: int = 1, noise: float = 0.0, **others: Any
) -> list[str]:
    """Check an attack whose sizes are given in pixels/255, before any data is there.

    Args:
        eps: size in pixels/255; l-inf: at most 255, where nothing is left of the image.
        alpha: step in pixels/255, ``None`` where the attack has none of its own.
        norm: see :func:`check_arguments`, as for the rest.
        steps: gradient steps.
        noise: as there.
        others: further arguments of :func:`check_arguments`.

    Returns:
        What is allowed but hardly meant (sizes on another scale), a sentence each.

    Raises:
        ValueError: as :func:`check_arguments`, or above 255.
    """
    check_arguments(eps=eps, alpha=alpha, norm=norm, steps=steps, noise=noise, **others)
    for name, size in (("eps", eps), ("alpha", alpha)):
        if norm == "linf" and size is not None and not size <= 255:
            raise ValueError(
                f"{name}={size:g} is in pixels/255 of the un-normalised image, and 255 takes black to white already: "
                "the literature's 8/255 is 8"
            )
    doubts = []
    if 0 < eps < _SMALLEST[norm]:
        doubts.append(
            f"eps={eps:g} is in pixels/255 and changes {'a value' if norm == 'linf' else 'a whole image'} by at most "
            f"{eps:g} of 255 grey levels; if it was meant in units of the full range, it is eps={eps * 255:g}"
        )
    elif alpha is not None and steps * alpha < eps / 10:
        doubts.append(
            f"alpha={alpha:g} is in pixels/255: {steps} step{'s' * (steps != 1)} of it go less than a tenth of the "
            f"way to eps={eps:g}; if it was meant in units of the full range, it is alpha={alpha * 255:g}"
        )
    return doubts


def _on_host(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise ValueError(f"{name} must be a number, or a tensor of them, got {value!r}")
    if isinstance(value, Integral) and not is_number(value):
        raise ValueError(f"{name} must be finite, and no float holds a whole number as large as this one")
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _check_size(name: str, value: Any) -> Any:
    value = _on_host(name, value)
    if not (_all(value >= 0) and _all(value < math.inf)):
        raise ValueError(f"{name} must be finite and must not be negative, got {_show(value)}")
    return value


def _all(condition: Any) -> bool:
    return bool(condition.all()) if isinstance(condition, Tensor) else bool(condition)


def _show(value: Amount) -> str:
    if not isinstance(value, Tensor):
        return f"{value:g}"
    if value.numel() <= 4:
        return str(value.flatten().tolist())
    return f"a tensor of shape {tuple(value.shape)} from {value.min():g} to {value.max():g}"
