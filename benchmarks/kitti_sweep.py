"""CenterNet-DLA34 on KITTI-1348, CPU-sized: every row of the table in configs/kitti/README.md, at equal cost.

    python benchmarks/kitti_sweep.py run [--only PATTERN ...] [--jobs 1] [--nice 15] [--work DIR]
    python benchmarks/kitti_sweep.py status [--only PATTERN ...]
    python benchmarks/kitti_sweep.py cost [--only PATTERN ...] [--rounds 12]
    python benchmarks/kitti_sweep.py compare [--work DIR]
    python benchmarks/kitti_sweep.py table [--write | --check]

``run`` works off the declared runs as ``sweep.py`` does: resumable, a metrics file each
(``configs/kitti/metrics/NAME.json``). ``compare`` adds to every finished run's file the difference of its AP to the
dense network's of the same seed, with the interval of paired draws of the frames; both runs' detections have to lie in
``--work``. ``table`` makes the README's table of the metrics files alone. Cost stands for processor time of training
over the dense run's, from paired steps (``cost``; ``metrics/costs.json``).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

from sweep import ROOT, Run, Sweep, between, read, relative_cost, say, seconds, selected, status

CONFIGS = ROOT / "configs/kitti"
METRICS = CONFIGS / "metrics"
README = CONFIGS / "README.md"
BEGIN, END = "<!-- kitti1348:begin -->", "<!-- kitti1348:end -->"
DENSE = "centernet_dla34x025_kitti1348_short"
SHAPE = (160, 512)
LABELS, SPLIT = "data/kitti/training/label_2", "data/kitti/ImageSets/val.txt"

#: name of a run, less its seed -> config's ending, row of the table, target
ROWS = {
    "dense": ("", "dense", 1.0),
    "prune50": ("_prune50", "pruned, default (early freeze, slimmed on the way)", 0.5),
    "narrow50": ("_narrow50", "control: built narrower", 0.5),
    "prune30": ("_prune30", "pruned, default", 0.3),
    "prune50_paper": ("_prune50_paper", "pruned, paper's mode", 0.5),
    "robust": ("_robust", "dense, FastAT", 1.0),
    "prune50_robust": ("_prune50_robust", "pruned, FastAT", 0.5),
}


def run_of(name: str, seed: int) -> Run:
    ending, row, target = ROWS[name]
    dense = f"configs/kitti/{DENSE}.py"
    args = (f"configs/kitti/{DENSE}{ending}.py", "--dense", dense, "--shape", *map(str, SHAPE))
    return Run(f"{name}_s{seed}", row, target, seed, "detector_run.py", args, DENSE + ending)


def declared() -> list[Run]:
    """All runs, in the order in which they are worked off."""
    first = [run_of(name, seed) for seed in (0, 1) for name in ("dense", "prune50", "narrow50")]
    return [*first, *(run_of(name, 0) for name in ("robust", "prune50_robust", "prune50_paper", "prune30"))]


def compare(sweep: Sweep) -> None:
    """Adds ``minus_dense`` to the metrics files of finished runs whose detections lie beside the dense network's."""
    from detector_run import rounded
    from measured import write_json

    from mmitp.commands import eval_kitti

    for run in sweep.runs.values():
        folders = [sweep.work / name / "results" for name in (run.name, f"dense_s{run.seed}")]
        if run.row == "dense" or not sweep.finished(run) or not all(folder.is_dir() for folder in folders):
            continue
        out = sweep.work / run.name / "minus_dense.json"
        words = [str(ROOT / LABELS), str(folders[0]), "--versus", str(folders[1]), "--split", str(ROOT / SPLIT)]
        with contextlib.redirect_stdout(io.StringIO()):
            eval_kitti.main([*words, "--out", str(out)])
        change = rounded(json.loads(out.read_text(encoding="utf-8"))["difference"])
        known = read(sweep.out, run.name)
        assert known is not None
        write_json(sweep.out / f"{run.name}.json", dict(known, minus_dense=change))
        say(f"{run.name}: Car moderate R40 {cell(change, 'Car', 1, '+')} against dense")


def cell(figures: dict[str, Any], name: str, difficulty: int, sign: str = "") -> str:
    """AP R40 with its interval, or '-' for a class without detections."""
    values = figures.get(name)
    if values is None or values["R40"][difficulty] is None:
        return "-"
    low, high = values["R40_interval"][difficulty]
    return f"{values['R40'][difficulty]:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def table(runs: list[Run], out: Path) -> str:
    """The Markdown table, a line a run, in the declared order of rows; "none yet" before the first."""
    costs = read(out, "costs") or {}
    lines = [
        "| KITTI-1348 (3DOP ids, JPEG 50, R40) | seed | Car, moderate | Pedestrian, moderate | Cyclist, moderate | "
        "Car, moderate, minus dense | ops | params | cost | processor time, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    finished = [(run, known) for run in runs if (known := read(out, run.name)) and known["state"] == "finished"]
    order = [f"{row} {target}" for _, row, target in ROWS.values()]
    for run, known in sorted(finished, key=lambda pair: (order.index(f"{pair[0].row} {pair[0].target}"), pair[0].seed)):
        cost = 1.0 if known["config"] == DENSE else relative_cost(known, costs)
        cells = [
            f"{run.row} (`{known['config']}`)",
            str(run.seed),
            *(cell(known["figures"], name, 1) for name in ("Car", "Pedestrian", "Cyclist")),
            cell(known.get("minus_dense", {}), "Car", 1, "+"),
            between([known["ops_kept"]]),
            between([known["params_kept"]]),
            "-" if cost is None else f"{cost:.2f}",
            seconds(known),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if finished else "No run has ended yet.\n"


def with_table(text: str, new: str) -> str:
    """The README's text with another table between the marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{README.name} must hold {BEGIN} and {END}, each once and in this order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{new}\n{text[text.index(END) :]}"


def measure_costs(sweep: Sweep, chosen: list[Run], rounds: int) -> None:
    """Measures steps and whole runs of the chosen runs' configs over the dense one's, and writes ``costs.json``."""
    from measured import origin, write_json
    from whole_run import whole_run_cost

    for config in dict.fromkeys(run.config for run in chosen if run.config != DENSE):
        entry = whole_run_cost(CONFIGS / f"{config}.py", CONFIGS / f"{DENSE}.py", rounds, 2, SHAPE)
        about = origin()
        entry.update(machine=about["machine"], commit=about["commit"], torch=about["versions"]["torch"])
        write_json(sweep.out / "costs.json", dict(read(sweep.out, "costs") or {}, **{config: entry}))
        say(f"{config}: {json.dumps(entry)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    arguments = {name: commands.add_parser(name) for name in ("run", "status", "cost", "compare", "table")}
    for name, command in arguments.items():
        command.add_argument("--out", type=Path, default=METRICS, help="folder of the metrics files")
        if name in ("run", "status", "cost"):
            command.add_argument("--only", nargs="+", metavar="PATTERN", help="names, beginnings of names or globs")
        if name != "table":
            default = Path("work_dirs/kitti1348")
            command.add_argument("--work", type=Path, default=default, help="logs, checkpoints, detections")
    arguments["run"].add_argument("--jobs", type=int, default=1)
    arguments["run"].add_argument("--nice", type=int, default=0)
    arguments["cost"].add_argument("--rounds", type=int, default=12)
    either = arguments["table"].add_mutually_exclusive_group()
    either.add_argument("--write", action="store_true", help="into the README")
    either.add_argument("--check", action="store_true", help="fail if the README says something else")
    args = parser.parse_args()

    runs = declared()
    if args.command == "table":
        new, text = table(runs, args.out), README.read_text(encoding="utf-8")
        if args.write:
            README.write_text(with_table(text, new), encoding="utf-8")
        elif args.check and with_table(text, new) != text:
            raise SystemExit(
                f"{README} does not hold what the metrics files say: python benchmarks/kitti_sweep.py table --write"
            )
        elif not args.check:
            print(new, end="")
        return
    sweep = Sweep(runs, args.out.resolve(), args.work.resolve(), configs=CONFIGS, figure="ap")
    if args.command == "compare":
        compare(sweep)
        return
    chosen = selected(runs, args.only)
    if args.command == "status":
        status(sweep, chosen)
    elif args.command == "cost":
        measure_costs(sweep, chosen, args.rounds)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through work_off's clean-up
        raise SystemExit(1 if sweep.work_off(chosen, args.jobs, args.nice) else 0)


if __name__ == "__main__":
    main()
