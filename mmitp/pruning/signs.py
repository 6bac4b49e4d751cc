"""The signs by which a pruning run behaves like the published one (S1 Fig. 1, S2).

Each sign comes with the figures it was judged by. ``psi*`` is the target, ``L_HW = max(ratio - psi*, 0)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass
class PruningRun:
    """What a run of PruneHook left in its folder.

    Attributes:
        name: of the folder.
        target, b, begin, end: PruneHook's; the window in epochs, or in iterations.
        init: what the masks started at.
        decay: weight decay on the masks.
        unit: of the window, ``'epoch'`` or ``'iteration'``.
        times: when each line was logged, in the unit of the window.
        hw_loss: L_HW of each line.
        lr: Optimizer 1's learning rate of each line.
        frozen: ``pruning.json``, or None if the run has not come to the freeze.
    """

    name: str
    target: float
    b: float | str
    begin: float
    end: float
    init: float
    decay: float
    unit: str
    times: list[float]
    hw_loss: list[float]
    lr: list[float]
    frozen: dict[str, Any] | None


class Sign(NamedTuple):
    """One sign: whether it shows (None: says nothing about this run, or not yet) and what was measured."""

    name: str
    shows: bool | None
    figures: str


def check_signs(run: PruningRun) -> list[Sign]:
    """All signs, in the order of the run."""
    end = _end_of_window(run)
    return [
        _flat(run),
        _gradual(run),
        _drops(run),
        _zero(run, end),
        _parameters(run),
        _stall(run, end),
        _miss(run, end),
    ]


def _end_of_window(run: PruningRun) -> float | None:
    """L_HW that the masks themselves reached, before the freeze corrected them."""
    return None if run.frozen is None else max(run.frozen["ratio_before"] - run.target, 0.0)


def _flat(run: PruningRun) -> Sign:
    before = [loss for t, loss in zip(run.times, run.hw_loss, strict=True) if t <= run.begin]
    name = "L_HW is flat at 1 - psi* until the window begins"
    if not before:
        return Sign(name, None, f"nothing logged before {run.begin:g}")
    level = 1 - run.target
    figures = f"1 - psi* = {level:.3f}, logged {min(before):.4f} to {max(before):.4f} up to {run.begin:g}"
    return Sign(name, max(abs(loss - level) for loss in before) < 0.01 * level, figures)


def _gradual(run: PruningRun) -> Sign:
    name = "L_HW falls gradually"
    level = run.hw_loss[0]
    inside = [(t, x) for t, x in zip(run.times, run.hw_loss, strict=True) if run.begin < t <= run.end]
    start = next((t for t, x in inside if x < 0.95 * level), None)
    if start is None:
        return Sign(name, False if run.frozen else None, f"still {run.hw_loss[-1]:.4f} of {level:.4f}")
    half = next((t for t, x in inside if x < 0.5 * level), None)
    zero = next((t for t, x in inside if x == 0), None)
    largest = max(a - b for (_, a), (_, b) in zip(inside, inside[1:], strict=False)) if len(inside) > 1 else level
    marks = [f"{what} at {t:.2f}" for what, t in (("95 %", start), ("half", half), ("0", zero)) if t is not None]
    figures = f"{', '.join(marks)} (window {run.begin:g} to {run.end:g}); largest fall between two lines {largest:.4f}"
    return Sign(name, largest < 0.5 * level, figures)


def _drops(run: PruningRun, span: float = 0.1) -> Sign:
    """Falls over ``span`` of the run before and after each drop of the learning rate by half or more."""
    name = "L_HW falls sharply at the learning rate's drops"
    drops = [
        i
        for i in range(1, len(run.lr))
        if run.lr[i] <= 0.5 * run.lr[i - 1] and run.begin < run.times[i] <= run.end and run.hw_loss[i - 1] > 0
    ]
    if not drops:
        return Sign(name, None, "no drop of the learning rate in the window while L_HW was above 0")
    width = span * run.times[-1]
    texts, sharper = [], True
    for i in drops:
        at = run.times[i - 1]
        here = run.hw_loss[i - 1]
        earlier = next(x for t, x in zip(run.times, run.hw_loss, strict=True) if t >= at - width)
        later = [x for t, x in zip(run.times, run.hw_loss, strict=True) if at <= t <= at + width][-1]
        texts.append(f"at {at:.1f}: fell by {earlier - here:.4f} in the {width:.1f} before, {here - later:.4f} after")
        sharper = sharper and here - later > 2 * max(earlier - here, 0.0)
    return Sign(name, sharper, "; ".join(texts))


def _zero(run: PruningRun, end: float | None) -> Sign:
    name = "L_HW ends at 0"
    if run.frozen is None or end is None:
        return Sign(name, None, f"not frozen yet; {run.hw_loss[-1]:.4f} at {run.times[-1]:.2f}")
    figures = (
        f"{end:.4f} when the window ended (ratio {run.frozen['ratio_before']:.4f}, psi* {run.target:g}); "
        f"{run.frozen['switched_off']} masks cut by the freeze, ratio {run.frozen['ratio']:.4f}"
    )
    return Sign(name, end == 0, figures)


def _parameters(run: PruningRun) -> Sign:
    name = "a larger share of the parameters is kept than of the operations"
    if run.frozen is None or "params_kept" not in run.frozen:
        return Sign(name, None, "pruning.json does not say" if run.frozen else "not frozen yet")
    params = run.frozen["params_kept"] / run.frozen["params_dense"]
    operations = run.frozen["macs_kept"] / run.frozen["macs_dense"]
    return Sign(name, params > operations, f"parameters {params:.4f}, operations {operations:.4f}")


def _stall(run: PruningRun, end: float | None) -> Sign:
    name = "without decay on the masks and from M = 1.0, L_HW stalls"
    if run.decay > 0 or run.init != 1.0 or run.b == "auto":
        return Sign(name, None, f"decay {run.decay:g}, M from {run.init:g}, b {run.b}")
    if end is None:
        return Sign(name, None, f"not frozen yet; {run.hw_loss[-1]:.4f} at {run.times[-1]:.2f}")
    return Sign(name, end > 0.05 * run.hw_loss[0], f"L_HW {end:.4f} when the window ended, of {run.hw_loss[0]:.4f}")


def _miss(run: PruningRun, end: float | None) -> Sign:
    name = "b = 10 misses 0.2"
    if (run.target, run.b) != (0.2, 10):
        return Sign(name, None, f"psi* {run.target:g}, b {run.b}")
    if end is None:
        return Sign(name, None, f"not frozen yet; {run.hw_loss[-1]:.4f} at {run.times[-1]:.2f}")
    return Sign(name, end > 0, f"operations {end + run.target:.4f} when the window ended" if end else "met by itself")
