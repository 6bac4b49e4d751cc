"""Every table of results in the repository, made of committed files: figures are typed into no page.

    python benchmarks/tables.py [--write | --check]

A page holds ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; what stands between them is the table of that name. It
is made by a function of :data:`MADE` from the metrics files of runs, or it is ``benchmarks/results/NAME.json``: columns
(title, decimals, how lists are joined, a unit), rows, and what they were measured with. Files marked ``transcribed``
were copied once from pages older than this script. ``--write`` also writes the index of configs (``metafiles.py``);
``--check`` fails where any page or index says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import kitti_sweep
import metafiles
import sweep

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = re.compile(r"<!-- ([\w-]+):begin -->")


def pages() -> list[Path]:
    """All Markdown pages that may hold tables."""
    folders = ("benchmarks", "configs", "data", "docs")
    return [*sorted(ROOT.glob("*.md")), *sorted(p for name in folders for p in (ROOT / name).rglob("*.md"))]


# -- tables in files


def markdown(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| ---", "|---").replace("--- |", "---|")


def cell(value: Any, column: Mapping[str, Any]) -> str:
    """A value as its column shows it; the middle of ``min / median / max`` is bold, and ``None`` is ``-``."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [cell(part, column) for part in value]
        if "min / median / max" in column["title"] or column.get("bold_median"):
            parts[1] = f"**{parts[1]}**"
        return column["join"].join(parts)
    return f"{value:,.{column.get('decimals', 0)}f}{column.get('suffix', '')}"


def from_file(path: Path) -> str:
    """The Markdown table of a file in ``benchmarks/results``."""
    table = json.loads(path.read_text(encoding="utf-8"))
    columns = table["columns"]
    rows = ([cell(value, column) for value, column in zip(row, columns, strict=True)] for row in table["rows"])
    return markdown((column["title"] for column in columns), rows)


# -- tables from the metrics files of runs


def step_costs() -> str:
    """What a step and a run of the sweep's configs cost, from ``cifar_sweep/costs.json``."""
    costs = sweep.read(sweep.METRICS, "costs") or {}
    parts = {"step": "", "before": "before the window", "window": "in it", "slimmed": "slimmed"}
    rows = []
    for config, entry in sorted(costs.items()):
        steps = []
        for key, said in parts.items():
            if key in entry:
                median, each = sweep.step_medians(entry, key)
                spread = f" ({', '.join(f'{m:.3f}' for m in each)})" if len(each) > 1 else ""
                steps.append(f"{median:.3f}{spread} {said}".strip())
        measurements = [*entry.get("earlier", ()), entry]
        first = next(iter(entry["epochs"]))
        length = f"{sum(entry['epochs'].values()):g}"
        rounds = ", ".join(str(m[first]["rounds"]) for m in measurements)
        commits = ", ".join(m["commit"] for m in measurements)
        rows.append([f"`{config}`", length, ", ".join(steps), f"{sweep.whole_run(entry):.2f}", rounds, commits])
    return markdown(
        ["config", "epochs", "a step (single measurements)", "whole run", "rounds", "commit"],
        rows,
    )


def mean(values: Iterable[float], decimals: int) -> str:
    return f"{statistics.mean(values):.{decimals}f}"


def front_rows(
    job: str, evidence: str, figure: Callable[[dict[str, Any]], float], names: Mapping[str, str], folder: Path
) -> list[list[str]]:
    """The front page's lines for a job, a network each: the mean over the seeds of its finished runs.

    Args:
        job: what was trained, with the unit of the figure.
        evidence: page with the whole table.
        figure: a run's figure from its metrics file.
        names: beginning of the metrics files' names -> the network, the dense one first; without a run of that there is
            no line at all.
        folder: of the metrics files.
    """
    costs = sweep.read(folder, "costs") or {}
    rows = []
    dense = next(iter(names))
    for name, said in names.items():
        files = [known for p in sorted(folder.glob(f"{name}_s[0-9]*.json")) if (known := sweep.read(folder, p.stem))]
        runs = [run for run in files if run["state"] == "finished"]
        if not runs:
            if name == dense:
                return []
            continue
        cost = [1.0 if name == dense else sweep.relative_cost(run, costs) for run in runs]
        rows.append(
            [
                f"[{job}]({evidence})" if not rows else "",
                said,
                f"{mean(map(figure, runs), 2)} ({len(runs)})",
                mean((run["ops_kept"] for run in runs), 3),
                mean((run["params_kept"] for run in runs), 3),
                mean((run["latency"]["ratio"][1] for run in runs), 2) if all("latency" in run for run in runs) else "-",
                "-" if None in cost else mean((c for c in cost if c is not None), 2),
            ]
        )
    return rows


def front() -> str:
    """The front page's table: detectors on real KITTI first, then CIFAR-10; lines for what has metrics files."""
    rows = front_rows(
        "CenterNet-DLA34 x 0.25, KITTI-1348, start from generated scenes: AP R40 moderate, mean of the three classes",
        "configs/kitti/README.md",
        kitti_sweep.mean_ap,
        {
            "started_dense": "dense",
            "started_prune50": "pruned to 0.5 by the default push, slimmed",
            "started_prune50_fisher": "pruned to 0.5 by `push='fisher'`, slimmed",
            "started_uniform50": "control at 0.5: the start made narrower (`mmitp control`)",
        },
        kitti_sweep.METRICS,
    )
    rows += front_rows(
        "RTMDet-tiny, the same",
        "configs/kitti/README.md",
        kitti_sweep.mean_ap,
        {
            "rtmdet_dense": "dense",
            "rtmdet_prune50_fisher": "pruned to 0.5 by `push='fisher'`, slimmed",
            "rtmdet_narrow50": "control at 0.5: built narrower",
        },
        kitti_sweep.METRICS,
    )
    rows += front_rows(
        "ResNet-20, CIFAR-10, time of 10 dense epochs: accuracy, %",
        "configs/cifar10/README.md",
        lambda run: run["accuracy"],
        {
            "dense": "dense",
            "psi50_brief": "pruned to 0.5, slimmed",
            "narrow50": "control at 0.5: built narrower",
            "psi30_brief": "pruned to 0.3, slimmed",
            "narrow30": "control at 0.3: built narrower",
        },
        sweep.METRICS,
    )
    return markdown(["", "", "mean (seeds)", "operations", "parameters", "time of an image", "training cost"], rows)


def demo() -> str:
    """Dense beside pruned, of the committed run of ``make demo``."""
    run = json.loads((ROOT / "benchmarks" / "demo.json").read_text(encoding="utf-8"))
    return (
        markdown(["", "dense", "pruned"], run["table"])
        + f"\n{run['epochs']} epochs of {run['images']} images, tested on {run['test_images']}; "
        f"{run['minutes']:.0f} minutes in all.\n"
    )


def bccd() -> str:
    """The table of docs/own_data.md, by the script that trains its runs."""
    from bccd import rows

    return "\n".join(rows()) + "\n"


def picture() -> str:
    """Detections of a dense and a pruned network, once the picture is committed."""
    path = ROOT / "docs" / "images" / "detections.jpg"
    if not path.is_file():
        return ""
    said = "Detections of the dense and of the pruned network side by side, and the channels that each layer keeps"
    whose = "RTMDet-tiny from random weights on BCCD's 205 photos, two photos of its test split"
    return f"![{said}]({path.relative_to(ROOT).as_posix()})<br>*{whose} ([figures](docs/own_data.md#what-came-out))*\n"


MADE: dict[str, Callable[[], str]] = {
    "bccd": bccd,
    "front": front,
    "picture": picture,
    "demo": demo,
    "step_costs": step_costs,
    "sweep": lambda: sweep.tables(sweep.declared(), sweep.METRICS),
    "kitti1348": lambda: kitti_sweep.table(kitti_sweep.declared(), kitti_sweep.METRICS),
    "kitti1348_robust": lambda: kitti_sweep.robust_table(kitti_sweep.declared(), kitti_sweep.METRICS),
}


# -- pages


def names(text: str) -> list[str]:
    """The tables that a page holds."""
    return BEGIN.findall(text)


def filled(text: str, page: str) -> str:
    """A page's text with its tables made anew.

    Raises:
        SystemExit: a table has no file and no function, or its marks do not come in pairs.
    """
    for name in names(text):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise SystemExit(f"{page} must hold {begin} and {end}, each once and in this order")
        path = RESULTS / f"{name}.json"
        if name not in MADE and not path.is_file():
            raise SystemExit(f"{page}: nothing makes a table {name}, and there is no {path.relative_to(ROOT)}")
        new = MADE[name]() if name in MADE else from_file(path)
        text = f"{text[: text.index(begin)]}{begin}\n\n{new}\n{text[text.index(end) :]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--write", action="store_true", help="into the pages and the index")
    either.add_argument("--check", action="store_true", help="fail if a page or the index says something else")
    args = parser.parse_args()
    wanted = {
        page: filled(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()) for page in pages()
    } | metafiles.files()
    wrong = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if args.write:
        for path in wrong:
            path.write_text(wanted[path], encoding="utf-8")
            print(path.relative_to(ROOT))
    elif wrong:
        said = ", ".join(path.relative_to(ROOT).as_posix() for path in wrong)
        raise SystemExit(f"not what the committed files say: {said}; python benchmarks/tables.py --write")


if __name__ == "__main__":
    sys.exit(main())
