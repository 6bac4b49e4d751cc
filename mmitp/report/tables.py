"""The report's tables, each once: as HTML, Markdown and CSV they hold the same cells."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmitp.models.config_text import type_name
from mmitp.models.slim_config import hooks_of, is_type
from mmitp.report.measure import Sizes, Timing
from mmitp.report.read import RunRecord, headline

__all__ = ["Table", "cost_table", "layer_table", "overview", "results_table", "versions_table"]


@dataclass
class Table:
    """A table: the title, the name of its CSV file, a header, rows of text, and a line of reading below it."""

    title: str
    name: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")

    def csv(self) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.header, *self.rows])
        return out.getvalue()


def overview(runs: Sequence[RunRecord], sizes: Sequence[Sizes], timings: Sequence[Timing | None]) -> Table:
    """What each run is, what it keeps and what it costs; a column a run."""
    costs = relative_costs(runs)
    rows: dict[str, list[str]] = {}

    def add(name: str, values: Sequence[str]) -> None:
        if any(values):
            rows[name] = list(values)

    add("network", [_network(run) for run in runs])
    add("target", ["" if run.hook is None else f"{run.hook.target:g} of the {_cost(run)}" for run in runs])
    add("state", [_state(run) for run in runs])
    add("steps", [f"{run.train[-1]['step']:,}" if run.train else "" for run in runs])
    add("operations, MACs, dense", [_number(size.macs_dense) for size in sizes])
    add("operations, MACs, kept", [_kept(size.macs_kept, size.macs_dense) for size in sizes])
    add("parameters, dense", [_number(size.params_dense) for size in sizes])
    add("parameters, kept", [_kept(size.params_kept, size.params_dense) for size in sizes])
    add("dense network, ms an image", ["" if t is None or not t.dense_ms else f"{t.dense_ms:.2f}" for t in timings])
    add(
        "slimmed network, ms an image",
        ["" if t is None or not t.slimmed_ms else f"{t.slimmed_ms:.2f}" for t in timings],
    )
    add("speed-up, median (quartiles)", ["" if t is None or not t.ratios else t.speed_up() for t in timings])
    add("training, minutes by the clock", [_minutes(run.wall_seconds()) for run in runs])
    add("training, minutes of processor", [_minutes(run.processor_seconds()) for run in runs])
    add("training, cost over the dense run's", costs)
    for metric in headline(sorted({name for run in runs for _, metrics in run.validations for name in metrics})):
        add(f"last validation, {metric}", [_last(run, metric) for run in runs])
    note = (
        "" if any(costs) or len(runs) < 2 else "No dense run is among these: give its folder too to compare the cost."
    )
    return Table("Overview", "overview", ["", *(run.name for run in runs)], [[k, *v] for k, v in rows.items()], note)


def _network(run: RunRecord) -> str:
    model = run.cfg.get("model", {})
    kind = _short(model.get("of") or model.get("type"))
    if backbone := (model.get("backbone") or {}).get("type"):
        kind = f"{kind} ({_short(backbone)})"
    adversarial = any(is_type(hook, "AdversarialHook") for hook in hooks_of(run.cfg))
    width = "pruned" if run.pruned else "small from the start" if run.small else "dense"
    return f"{kind}, {width}" + (", adversarial" if adversarial else "")


def _short(kind: Any) -> str:
    return type_name(kind).split(".")[-1]


def _cost(run: RunRecord) -> str:
    assert run.hook is not None
    cost = run.hook.get("cost", "macs")
    cost = cost if isinstance(cost, str) else str(cost.get("type"))
    return {"macs": "operations", "params": "parameters"}.get(cost, cost)


def _state(run: RunRecord) -> str:
    if run.hook is None:
        return ""
    if run.frozen is not None:
        return f"frozen at {run.frozen['ratio']:.4f} ({run.frozen['ratio_before']:.4f} before the freeze)"
    kept = [line["ops_kept"] for line in run.train if "ops_kept" in line]
    return f"not frozen yet, at {kept[-1]:.4f}" if kept else "not frozen yet"


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _kept(part: int | None, whole: int | None) -> str:
    return _number(part) if part is None or not whole else f"{part:,} ({part / whole:.4f})"


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f}"


def _last(run: RunRecord, metric: str) -> str:
    values = [metrics[metric] for _, metrics in run.validations if metric in metrics]
    return f"{values[-1]:.4g}" if values else ""


def relative_costs(runs: Sequence[RunRecord]) -> list[str]:
    """Cost of each run over that of the first dense one: processor time where both recorded it, else the clock's."""
    dense = next((run for run in runs if not (run.pruned or run.small)), None)
    if dense is None or len(runs) < 2:
        return [""] * len(runs)
    costs = []
    for run in runs:
        for kind, (mine, its) in {
            "processor time": (run.processor_seconds(), dense.processor_seconds()),
            "by the clock": (run.wall_seconds(), dense.wall_seconds()),
        }.items():
            if mine and its:
                costs.append(f"{mine / its:.3f} ({kind})")
                break
        else:
            costs.append("")
    return costs


def cost_table(runs: Sequence[RunRecord]) -> Table:
    """Seconds a step by phase of each run, medians of the logged lines, and over those before the window."""
    rows = []
    for run in runs:
        first = None
        for phase, lines in run.phases():
            times = [line["time"] for line in lines if isinstance(line.get("time"), (int, float))]
            if not times:
                continue
            median = statistics.median(times)
            first = first or median
            steps = f"{lines[0]['step']:,} to {lines[-1]['step']:,}"
            rows.append([run.name, phase, steps, f"{median:.4g}", f"{median / first:.3f}"])
    header = ["run", "phase", "logged steps", "seconds a step", "over the first phase's"]
    note = "By the clock, medians of the logged lines: on a machine that does other work too they say little."
    return Table("Training cost by phase", "cost", header, rows, note)


def results_table(runs: Sequence[RunRecord]) -> Table:
    """Every test found: the network (before and after slimming), clean and under attack, and its figures."""
    found = [(run, result) for run in runs for result in run.results]
    metrics = headline(sorted({name for _, result in found for name in result.metrics}))
    rows = []
    for run, result in found:
        images = result.run.get("images")
        cells = [f"{result.metrics[name]:.4g}" if name in result.metrics else "" for name in metrics]
        rows.append([run.name, result.network, result.test, "" if images is None else str(images), *cells])
    missing = [run.name for run in runs if not run.results]
    note = (
        ""
        if not missing
        else f"No test was found in {', '.join(missing)}: mmitp test CONFIG CHECKPOINT --out WORK_DIR/test.json "
        "(--attack pgd --eps 2 for one under attack) leaves one."
    )
    return Table("Tests", "tests", ["run", "network", "test", "images", *metrics], rows, note)


def layer_table(run: RunRecord) -> Table:
    """Channels and operations kept of each layer, in the order of the network."""
    assert run.frozen is not None
    rows = [
        [
            row["name"],
            f"{row['in_kept']} of {row['in_channels']}",
            f"{row['out_kept']} of {row['out_channels']}",
            f"{row['macs_dense']:,}",
            f"{row['macs_kept']:,}",
            row.get("note", ""),
        ]
        for row in run.frozen["layers"]
    ]
    header = ["layer", "inputs kept", "outputs kept", "MACs dense", "MACs kept", "note"]
    return Table(f"Channels kept, {run.name}", f"channels_{run.name}", header, rows)


def versions_table(runs: Sequence[RunRecord]) -> Table:
    """Commands, devices and versions of trainings and tests."""
    rows = []
    for run in runs:
        for what, record in [*(("training", r) for r in run.records), *((r.file.name, r.run) for r in run.results)]:
            row = [run.name, what, _command(record), str(record.get("device", "")), _versions(record)]
            if row not in rows:
                rows.append(row)
    missing = [run.name for run in runs if not run.records]
    note = f"The training of {', '.join(missing)} recorded no command." if missing else ""
    return Table("Commands and versions", "commands", ["run", "of", "command", "device", "versions"], rows, note)


def _command(record: dict[str, Any]) -> str:
    words = record.get("command") or []
    return " ".join(map(str, words))


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
