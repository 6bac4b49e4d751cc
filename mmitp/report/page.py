"""The report: one HTML page that needs nothing else, and its tables as Markdown and CSV."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mmitp.engine.results import check_writable
from mmitp.files import told_apart, write_whole
from mmitp.report.measure import Sample, Sizes, Timing, input_shape, sample_detections, sizes_of, time_run
from mmitp.report.read import RunRecord
from mmitp.report.svg import Line, bar, line_chart
from mmitp.report.tables import Table, cost_table, layer_table, overview, results_table, versions_table
from mmitp.report.template import PAGE

__all__ = ["write_report"]


def write_report(
    runs: Sequence[RunRecord],
    out: str | Path,
    title: str | None = None,
    shape: tuple[int, int] | None = None,
    rounds: int | None = None,
    timing: bool = True,
    samples: int = 4,
    trust: bool = False,
) -> list[Path]:
    """Writes ``index.html``, ``report.md`` and a CSV file a table into a folder.

    Args:
        runs: from :func:`~mmitp.report.read.read_run`; the dense one first, if there is one. Those of one name are
            named by the folders above, too.
        out: the folder.
        title: of the page.
        shape: (H, W) of the input that dense networks are counted and timed at; by default a pruned run's.
        rounds: timings of each network; None for some seconds of them.
        timing: whether to time dense and slimmed networks.
        samples: test images with detections a run; 0 for none.
        trust: also read checkpoints that may run code.

    Returns:
        The files, the page first.

    Raises:
        ValueError: no run, one folder twice, or the folder cannot be written.
    """
    if not runs:
        raise ValueError("a report needs a run: give its work folder")
    names = told_apart([run.folder for run in runs])
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    folder = Path(out)
    check_writable(folder / "index.html")
    own = [input_shape(run, trust) for run in runs]
    common = shape or next((known for known in own if known), None)
    shapes = [shape or known or common for known in own]
    sizes: list[Sizes] = [sizes_of(*each) for each in zip(runs, shapes, own, strict=True)]
    timings: list[Timing | None] = [
        time_run(run, at, rounds) if timing and at else None for run, at in zip(runs, shapes, strict=True)
    ]
    pictures: list[tuple[str, Sample | str]] = [
        (run.name, sample_detections(run, samples, trust)) for run in runs if samples
    ]
    layers = [layer_table(run) for run in runs if run.frozen is not None]
    tables = [
        overview(runs, sizes, timings),
        results_table(runs),
        cost_table(runs),
        *layers,
        versions_table(runs),
    ]
    remarks = [f"{run.name}: {remark}" for run in runs for remark in run.remarks]
    counted = [size.shape for size in sizes]
    if len(set(counted)) > 1:
        remarks.append(f"operations are stated for different input sizes: {_each(names, counted)}")
    elif shape and counted[0] != shape:
        remarks.append(
            f"operations are stated for {_each(names, counted)}, as the freeze noted them: "
            "no slimmed network is there to be counted at --shape"
        )
    if timing and common is None:
        remarks.append("nothing was timed: no run says which input size it is for (--shape H W)")
    heading = title or "Runs side by side: " * (len(runs) > 1) + ", ".join(names)
    machine = next((t.machine for t in timings if t is not None), None)
    page = render(
        heading,
        runs,
        tables,
        pictures=pictures,
        remarks=remarks,
        timed=f"Latency: one image of {_each(names, shapes)}, one thread, {machine}." if machine else "",
    )
    written = {"index.html": page, "report.md": markdown(heading, tables, remarks)}
    for table in tables:
        if table.rows:
            written[_csv_name(table.name, written)] = table.csv()
    for name, text in written.items():
        write_whole(folder / name, text)
    return [folder / name for name in written]


def _each(names: Sequence[str], shapes: Sequence[tuple[int, int] | None]) -> str:
    """The size that runs have in common, or each one's."""
    texts = ["unknown size" if shape is None else f"{shape[0]}x{shape[1]}" for shape in shapes]
    if len(set(texts)) == 1:
        return texts[0]
    return ", ".join(f"{text} ({name})" for name, text in zip(names, texts, strict=True))


def _csv_name(name: str, taken: Iterable[str]) -> str:
    """The file of a table; runs whose names differ in what a file's name is better without get numbers."""
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    names = (f"{stem}{number}.csv" for number in itertools.chain([""], (f"_{n}" for n in itertools.count(2))))
    return next(name for name in names if name not in taken)


def markdown(heading: str, tables: Sequence[Table], remarks: Sequence[str]) -> str:
    parts = [f"# {heading}\n", *(f"- {remark}" for remark in remarks)]
    parts += [table.markdown() for table in tables if table.rows or table.note]
    return "\n".join(parts)


def render(heading: str, runs: Sequence[RunRecord], tables: Sequence[Table], **more: Any) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    by_name = {table.name: table for table in tables}
    channels = [(run, _bars(run)) for run in runs if run.frozen is not None]
    return environment.from_string(PAGE).render(
        heading=heading,
        overview=by_name["overview"],
        charts=[(caption, Markup(chart)) for caption, chart in charts(runs) if chart],
        tests=by_name["tests"],
        cost=by_name["cost"],
        channels=channels,
        commands=by_name["commands"],
        configs=_configs(runs),
        **more,
    )


def charts(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Captions and charts: operations kept, the loss of the budget, the loss of the task, the learning rate."""
    windows = [window for run in runs if (window := run.window()) is not None]
    targets = sorted({float(run.hook.target) for run in runs if run.hook is not None})
    shaded = " The shaded part is the window in which masks train." if windows else ""
    dotted = f" The thin line is the target, {', '.join(f'{t:g}' for t in targets)}." if targets else ""

    def lines(key: str) -> list[Line]:
        found = []
        for run in runs:
            points = [(line["step"], line[key]) for line in run.train if _finite(line.get(key))]
            if points:
                found.append(Line(run.name, *map(list, zip(*points, strict=True))))
        return found

    axes: dict[str, Any] = dict(x_label="step", spans=sorted(set(windows)))
    return [
        (
            f"Share of the budget kept.{dotted}{shaded}",
            line_chart(lines("ops_kept"), "share kept against steps", y_label="kept / dense", targets=targets, **axes),
        ),
        (
            f"Loss of the budget, L_HW: how far the share lies above the target.{shaded}",
            line_chart(lines("L_HW"), "L_HW against steps", y_label="L_HW", **axes),
        ),
        (f"Training loss.{shaded}", line_chart(lines("loss"), "loss against steps", y_label="loss", **axes)),
        (f"Learning rate.{shaded}", line_chart(lines("lr"), "learning rate against steps", y_label="lr", **axes)),
    ]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def _bars(run: RunRecord) -> list[tuple[str, Markup, str, Markup, str]]:
    assert run.frozen is not None
    rows = []
    for row in run.frozen["layers"]:
        inputs = f"{row['in_kept']} of {row['in_channels']}"
        macs = f"{row['macs_kept'] / row['macs_dense']:.0%}" if row["macs_dense"] else ""
        rows.append(
            (
                row["name"],
                Markup(bar(row["in_kept"], row["in_channels"], f"{row['name']}: {inputs} input channels kept")),
                inputs,
                Markup(bar(row["macs_kept"], row["macs_dense"], f"{row['name']}: {macs} of its operations kept")),
                macs,
            )
        )
    return rows


def _configs(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """The first run's config, and of the others what differs from it."""
    texts = [_text(run) for run in runs]
    shown = [(f"Config of {runs[0].name}", texts[0])]
    for run, text in zip(runs[1:], texts[1:], strict=True):
        diff = difflib.unified_diff(texts[0].splitlines(), text.splitlines(), runs[0].name, run.name, lineterm="", n=2)
        shown.append((f"{run.name}, against {runs[0].name}", "\n".join(diff) or "no difference"))
    return shown


def _text(run: RunRecord) -> str:
    """The config with its work folder, in which any two runs differ, as '.'."""
    text, work_dir = run.cfg.pretty_text, str(run.cfg.get("work_dir") or ".")
    text = re.sub(rf"(?<=['\"]){re.escape(work_dir)}(?=/)", ".", text)  # files in it
    return re.sub(rf"(?m)^(work_dir ?= ?['\"]){re.escape(work_dir)}(?=['\"])", r"\1.", text)
