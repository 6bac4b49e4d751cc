"""Curves and bars of a pruning run. Needs matplotlib, which is imported when something is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmitp.files import write_whole

__all__ = ["plot_budget", "plot_channels", "plot_hw_losses", "plot_robustness"]


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing curves needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _label(name: str) -> str:
    """A name as the legend shows it: matplotlib reads formulas between dollars, and hides what begins with ``_``."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _save(figure: Any, out_path: str | Path) -> Path:
    path, drawn = Path(out_path), io.BytesIO()
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{path}: the ending says what to draw, one of {', '.join(sorted(known))}")
    figure.savefig(drawn, dpi=120, format=path.suffix[1:].lower())
    write_whole(path, drawn.getbuffer())
    return path


def plot_budget(
    steps: Sequence[float],
    ratio: Sequence[float],
    out_path: str | Path,
    target: float | None = None,
    hw_loss: Sequence[float] | None = None,
    xlabel: str = "iteration",
) -> Path:
    """The share of operations kept over a run, its target, and the budget loss L_HW on a second axis.

    Args:
        steps: (N,) iterations or epochs.
        ratio: (N,) kept MACs / dense MACs, in [0, 1].
        out_path: picture to write (png, pdf, svg); its folder is made.
        target: psi*, drawn as a dashed line.
        hw_loss: (N,) values of L_HW.
        xlabel: unit of ``steps``.

    Raises:
        ValueError: no or unequally many values.
        ImportError: without matplotlib.
    """
    if not len(steps) or len(ratio) != len(steps) or (hw_loss is not None and len(hw_loss) != len(steps)):
        raise ValueError(f"need equally many steps, ratios and losses, at least one: {len(steps)}, {len(ratio)}")
    figure = _figure(7, 3.6)
    axes = figure.add_subplot()
    axes.plot(steps, ratio, color="tab:blue", label="operations kept")
    if target is not None:
        axes.axhline(target, color="tab:blue", linestyle="--", linewidth=1, label=f"target {target:g}")
    axes.set(xlabel=xlabel, ylabel="MACs kept / dense", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if hw_loss is not None:
        twin = axes.twinx()
        (line,) = twin.plot(steps, hw_loss, color="tab:orange", linewidth=1)
        twin.set(ylabel="L_HW")
        twin.set_ylim(bottom=0)
        handles, labels = [*handles, line], [*labels, "L_HW"]
    axes.legend(handles, labels, loc="best")
    return _save(figure, out_path)


def plot_hw_losses(
    runs: Mapping[str, tuple[Sequence[float], Sequence[float]]], out_path: str | Path, xlabel: str = "epoch"
) -> Path:
    """The budget loss L_HW of several runs in one picture.

    Args:
        runs: name -> (times (N,), values of L_HW (N,)).
        out_path: picture to write; its folder is made.
        xlabel: unit of the times.

    Raises:
        ValueError: no run, or one with no or unequally many values.
        ImportError: without matplotlib.
    """
    if not runs or any(not len(times) or len(times) != len(values) for times, values in runs.values()):
        raise ValueError("need at least one run, each with equally many times and losses")
    figure = _figure(7, 3.6)
    axes = figure.add_subplot()
    for name, (times, values) in runs.items():
        axes.plot(times, values, label=_label(name), linewidth=1)
    axes.set(xlabel=xlabel, ylabel="L_HW")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _save(figure, out_path)


def plot_channels(
    names: Sequence[str], kept: Sequence[int], total: Sequence[int], out_path: str | Path, title: str = ""
) -> Path:
    """A bar a layer: channels (or operations) kept of all.

    Args:
        names: (L,) layers, first on top.
        kept, total: (L,) numbers of channels, 0 <= kept <= total.
        out_path: picture to write; its folder is made.
        title: above the bars.

    Raises:
        ValueError: no or unequally many values, or a layer that keeps more than it has.
        ImportError: without matplotlib.
    """
    if not names or len(names) != len(kept) or len(names) != len(total):
        raise ValueError(f"need as many kept and total numbers as layers: {len(names)}, {len(kept)}, {len(total)}")
    for name, part, whole in zip(names, kept, total, strict=True):
        if not 0 <= part <= whole:
            raise ValueError(f"layer {name} cannot keep {part} of {whole}")
    figure = _figure(8, 1.2 + 0.2 * len(names))
    axes = figure.add_subplot()
    rows = range(len(names))
    axes.barh(rows, total, color="0.85", label="all")
    axes.barh(rows, kept, color="tab:blue", label="kept")
    for row, part, whole in zip(rows, kept, total, strict=True):
        share = f" {100 * part / whole:.0f} %" if whole else ""
        axes.text(whole, row, share, va="center", fontsize=7)
    axes.set_yticks(rows, names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(xlabel="channels", title=title)
    figure.legend(loc="outside upper right", ncols=2)
    return _save(figure, out_path)


def plot_robustness(
    eps: Sequence[float], curves: Mapping[str, Sequence[float]], out_path: str | Path, title: str = ""
) -> Path:
    """Metrics over the size of an attack.

    Args:
        eps: (N,) sizes in pixels/255, ascending; 0 is the clean figure.
        curves: (N,) values of each metric.
        out_path: picture to write; its folder is made.
        title: above the curves, as a rule the attack.

    Raises:
        ValueError: no or unequally many values.
        ImportError: without matplotlib.
    """
    if not len(eps) or not curves or any(len(values) != len(eps) for values in curves.values()):
        raise ValueError(
            f"need as many values a curve as sizes, at least one: {len(eps)}, {[len(v) for v in curves.values()]}"
        )
    figure = _figure(7, 3.6)
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(eps, values, marker="o", label=_label(name))
    axes.set(xlabel="eps [pixels/255]", ylabel="metric")
    axes.set_title(title, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    return _save(figure, out_path)
