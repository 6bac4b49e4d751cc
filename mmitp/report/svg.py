"""Line charts and bars as inline SVG: no script, no fonts or files from elsewhere, readable without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "bar", "line_chart", "ticks"]

# Told apart by dashes and by labels at their ends; the colours (Okabe and Ito's) are for those who see them.
_DASHES = ("", "6 3", "2 3", "10 3 2 3", "1 2", "14 4")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
_WIDTH, _HEIGHT = 400.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 12.0, 40.0
_POINTS = 300  # of a line; more are not seen


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, and equally many finite x and y."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    targets: Sequence[float] = (),
    spans: Sequence[tuple[float, float]] = (),
    from_zero: bool = True,
) -> str:
    """A chart as an ``<svg>`` element; empty where no line has a point.

    Args:
        lines: at most six are told apart by their dashes.
        title: read out in place of the picture.
        x_label, y_label: at the axes.
        targets: values of y drawn as thin horizontal lines.
        spans: stretches of x that are shaded.
        from_zero: the y axis begins at 0.
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    x_low, x_high = min(min(line.x) for line in lines), max(max(line.x) for line in lines)
    y_values = [*(v for line in lines for v in line.y), *targets]
    y_low, y_high = (min(0.0, *y_values) if from_zero else min(y_values)), max(y_values)
    x_high = x_high if x_high > x_low else x_low + 1
    y_high = y_high if y_high > y_low else y_low + 1

    def at_x(value: float) -> float:
        return _LEFT + (min(max(value, x_low), x_high) - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT + 16 * len(lines):g}" role="img" class="chart">']
    parts.append(f"<title>{escape(title)}</title>")
    for begin, end in spans:
        left, right = at_x(begin), at_x(end)
        parts.append(
            f'<rect x="{left:.1f}" y="{_TOP:g}" width="{max(right - left, 0):.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM:g}" class="span"/>'
        )
    for value in ticks(y_low, y_high):
        y = at_y(value)
        parts.append(f'<path d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 5:g}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for value in ticks(x_low, x_high):
        parts.append(
            f'<text x="{at_x(value):.1f}" y="{_HEIGHT - _BOTTOM + 15:g}" text-anchor="middle">{value:.6g}</text>'
        )
    for value in targets:
        parts.append(f'<path d="M{_LEFT:g} {at_y(value):.1f}H{_WIDTH - _RIGHT:g}" class="target"/>')
    for number, line in enumerate(lines):
        style = f'stroke="{_COLOURS[number % 6]}" stroke-dasharray="{_DASHES[number % 6]}"'
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in _thinned(line))
        parts.append(f'<polyline points="{points}" class="line" {style}/>')
        y = _HEIGHT + 16 * number + 8
        parts.append(f'<path d="M{_LEFT:g} {y - 4:g}h34" class="line" {style}/>')
        parts.append(f'<text x="{_LEFT + 40:g}" y="{y:g}">{escape(line.name)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{_HEIGHT - 8:g}" text-anchor="middle">{escape(x_label)}</text>')
    down = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text transform="translate(12 {down:g}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return "".join([*parts, "</svg>"])


def _thinned(line: Line) -> list[tuple[float, float]]:
    points = list(zip(line.x, line.y, strict=True))
    stride = -(-len(points) // _POINTS)
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def bar(part: float, whole: float, title: str) -> str:
    """A bar of 100 units, filled up to ``part / whole``, outlined to its end."""
    filled = 100 * part / whole if whole else 0.0
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" class="bar"><title>{escape(title)}</title>'
        f'<rect x="0" y="0" width="{filled:.1f}" height="10" class="kept"/>'
        '<rect x="0" y="0" width="100" height="10" class="all"/></svg>'
    )
