"""The guide's example: RTMDet-tiny on BCCD in one processor time, dense, pruned and built narrower; clean and attacked.

    python benchmarks/bccd.py configs/bccd/rtmdet_tiny_bccd.py [--seed 0] [--eps 2] [--work-dir DIR]
        [--metrics benchmarks/bccd/rtmdet_tiny_bccd_s0.json] [--cfg-options KEY=VALUE ...]

It trains as ``detector_run.py`` does (one thread, data loading in the same process, validation left out of the
seconds; a stopped run goes on when the command is given again). Then a pruned network is slimmed, a small one is timed
beside the dense one, and the network is tested on the test split, clean and under PGD-10 on the training loss.
``tables.py`` puts the figures of ``benchmarks/bccd/*.json`` into ``docs/own_data.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from measured import Task, configured, finish, measured_run, origin, sizes, spread_of  # first: see there
from mmengine import Config
from mmengine.registry import MODELS

from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.engine.robust_eval import EvalAttack, build_test_runner, evaluate
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.models.slim_config import is_masked
from mmitp.pruning.latency import paired_times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "bccd"
DENSE = ROOT / "configs" / "bccd" / "rtmdet_tiny_bccd.py"
AP, AP50 = "coco/bbox_mAP", "coco/bbox_mAP_50"


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    name = Path(args.config).stem
    args.work_dir = args.work_dir or f"work_dirs/{name}_s{args.seed}"
    path = Path(args.metrics or RESULTS / f"{name}_s{args.seed}.json")
    cfg = configured(args, args.config)
    width, height = cfg.input_size
    shape = (height, width)
    dense = MODELS.build(load_config(str(DENSE)).model).eval()
    size = sizes(dense, shape)
    head = dict(
        config=name,
        options=args.cfg_options,
        seed=args.seed,
        **origin(),
        shape=list(shape),
        macs_dense=size["macs"],
        params_dense=size["params"],
    )
    result = measured_run(cfg, path, head, task=Task(shape, AP, "ap", 100.0))
    checkpoint = f"{cfg.work_dir}/epoch_{cfg.train_cfg.max_epochs}.pth"
    config = args.config
    if is_masked(cfg.model):
        slimmed = slim_checkpoint(cfg, checkpoint, f"{cfg.work_dir}/slim")
        config, checkpoint = slimmed.config, slimmed.weights
    test = load_config(config, work_dir=f"{cfg.work_dir}/test")
    test.load_from = checkpoint
    small = {} if name == DENSE.stem else {"latency": latencies(dense, MODELS.build(test.model).eval(), shape)}
    finish(path, result, **small, test=tested(test, args.eps))


def latencies(dense: torch.nn.Module, small: torch.nn.Module, shape: tuple[int, int]) -> dict[str, Any]:
    """Milliseconds of processor time for one image, medians of paired timings, and the ratio's median and quartiles."""
    times = paired_times([dense, small], blank_example(dense, shape))
    middle = [round(statistics.median(column) / 1e6, 2) for column in times.T.tolist()]
    return dict(dense_ms=middle[0], slimmed_ms=middle[1], speed_up=spread_of((times[:, 0] / times[:, 1]).tolist()))


def tested(cfg: Config, eps: float) -> dict[str, Any]:
    report = evaluate(build_test_runner(cfg), EvalAttack(name="pgd", steps=10), [eps])
    nothing = {AP: 0.0, AP50: 0.0}  # mmdet's CocoMetric is empty where no box was found
    clean, attacked = (
        {k: round(100 * v, 2) for k, v in (m or nothing).items()} for m in (report.clean, report.attacked[0])
    )
    return dict(images=report.images, attack=report.attack.describe(), eps=eps, clean=clean, attacked=attacked)


# -- the table


def rows() -> list[str]:
    """A line a config: means over its seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        figures = json.loads(file.read_text(encoding="utf-8"))
        if figures["state"] == "finished":
            runs.setdefault(figures["config"], []).append(figures)
    if not runs:
        return ["Not measured yet."]
    lines = [
        "| config | seeds | epochs | minutes | MMACs | parameters | AP, val | AP (by seed) | AP50 | AP50, attacked | "
        "ms over dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(runs, key=len):
        group = runs[name]
        cells = [
            f"[{name}](../configs/bccd/{name}.py)",
            ", ".join(str(g["seed"]) for g in group),
            str(group[0]["epochs"][-1]["epoch"]),
            f"{mean(g['train_seconds'] for g in group) / 60:.1f}",
            f"{mean(g['macs'] for g in group) / 1e6:,.1f} ({mean(g['ops_kept'] for g in group):.3f})",
            f"{mean(g['params'] for g in group):,.0f} ({mean(g['params_kept'] for g in group):.3f})",
            f"{mean(g['ap'] for g in group):.1f}",
            by_seed([g["test"]["clean"][AP] for g in group]),
            f"{mean(g['test']['clean'][AP50] for g in group):.1f}",
            f"{mean(g['test']['attacked'][AP50] for g in group):.1f}",
            "1" if name == DENSE.stem else over_dense(group),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    one = next(iter(runs.values()))[0]
    machines = sorted({run["machine"] for group in runs.values() for run in group})
    return [
        *lines,
        "",
        f"{one['test']['images']} photos of the test split, at {one['shape'][0]}x{one['shape'][1]}. Minutes: processor "
        f"time of training, one thread ({' or '.join(machines)}). ms over dense: one image, one thread, each in turn "
        f"with the dense network. Attack: {one['test']['attack']}, eps {one['test']['eps']:g}/255.",
    ]


def by_seed(figures: list[float]) -> str:
    """Their mean, and each of several."""
    each = ", ".join(f"{figure:.1f}" for figure in figures)
    return f"{mean(figures):.1f} ({each})" if len(figures) > 1 else each


def over_dense(group: list[dict[str, Any]]) -> str:
    """Time of an image over the dense network's, timed in turn: the median over the seeds."""
    return f"{statistics.median(1 / g['latency']['speed_up']['median'] for g in group):.2f}"


def mean(values: Any) -> float:
    return statistics.fmean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eps", type=float, default=2.0, help="size of the attack, pixels/255")
    parser.add_argument("--work-dir", help="default: work_dirs/CONFIG_sSEED")
    parser.add_argument("--metrics", help="default: benchmarks/bccd/CONFIG_sSEED.json")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.set_defaults(data_root=None, batches=None)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
