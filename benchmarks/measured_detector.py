"""Trains detectors' configs as ``tools/train.py`` does, tests what comes out, and writes down what it cost and gives.

    python benchmarks/measured_detector.py run configs/bccd/rtmdet_tiny_bccd.py [--seed 0] [--eps 2] [--work-dir DIR]
        [--metrics benchmarks/bccd/rtmdet_tiny_bccd_s0.json] [--cfg-options KEY=VALUE ...]
    python benchmarks/measured_detector.py table [--check]

The metrics file gets the config's own test, clean and under PGD-10 on the training loss; processor seconds of training
(one thread, data loading in the same process, validation left out), operations and parameters. A pruned network is
slimmed first, and timed beside the dense one in turn. A run that was stopped goes on from its last checkpoint when the
same command is given again. ``table`` writes the figures of ``benchmarks/bccd/*.json`` into ``docs/own_data.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from measured import TrainingClock, origin, spread_of, write_json  # makes the OpenMMLab stack importable
from mmengine import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.engine.robust_eval import EvalAttack, build_test_runner, evaluate
from mmitp.engine.run import build_runner
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.models.slim_config import is_masked
from mmitp.pruning.check import counted_macs
from mmitp.pruning.latency import paired_times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "bccd"
PAGE = ROOT / "docs" / "own_data.md"
MARKS = ("<!-- table: measured_detector.py -->", "<!-- end of table -->")
AP = ("bbox_mAP", "bbox_mAP_50")


class Clock(TrainingClock):
    """Keeps the seconds in the checkpoints, so that they go on with a run that was stopped."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._stop(runner)
        checkpoint["measured"] = dict(self.seconds)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.seconds = dict(checkpoint["measured"])


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    name = Path(args.config).stem
    work_dir = args.work_dir or f"work_dirs/{name}_s{args.seed}"
    cfg = load_config(args.config, args.cfg_options, work_dir)
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.randomness = dict(seed=args.seed)
    cfg.resume = True
    head = dict(config=name, options=args.cfg_options, seed=args.seed, **origin())

    runner = build_runner(cfg)
    clock = Clock()
    runner.register_hook(clock)
    runner.train()
    saved = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    checkpoint = str(saved.last_ckpt or Path(work_dir) / f"epoch_{runner.epoch}.pth")
    sizes = sizes_of(cfg, checkpoint, work_dir)
    report = evaluate(
        build_test_runner(sizes.pop("test")), EvalAttack(name="pgd", steps=10, objective="truth"), [args.eps]
    )
    path = Path(args.metrics or RESULTS / f"{name}_s{args.seed}.json")
    figures = dict(
        head,
        epochs=runner.epoch,
        iterations=runner.iter,
        train_seconds=round(clock.seconds["train"], 1),
        wall_seconds=round(clock.seconds["wall"], 1),
        **sizes,
        images=report.images,
        attack=report.attack.describe(),
        eps=args.eps,
        clean=last_names(report.clean),
        attacked=last_names(report.attacked[0]),
    )
    write_json(path, figures)
    print(json.dumps(figures, indent=1), f"\nwrote {path}")


def last_names(metrics: dict[str, Any]) -> dict[str, float]:
    return {name.split("/")[-1]: value for name, value in metrics.items() if isinstance(value, float)}


def sizes_of(cfg: Config, checkpoint: str, work_dir: str) -> dict[str, Any]:
    """Operations, parameters and milliseconds of the dense and of the trained network, and the config to test."""
    init_default_scope(cfg.default_scope)
    shape = next((tuple(h.input_shape) for h in cfg.custom_hooks if "input_shape" in h), None)
    plain = cfg.model.copy()
    if is_masked(plain):
        plain.type = plain.pop("of")
        plain.pop("prune", None)
    dense = MODELS.build(plain).eval()
    if not is_masked(cfg.model):
        test = load_config(cfg.filename, work_dir=f"{work_dir}/test")
        test.load_from = checkpoint
        width, height = cfg.input_size
        example = blank_example(dense, (height, width))
        macs, params = counted_macs(dense, example), sum(p.numel() for p in dense.parameters())
        return dict(test=test, macs=macs, macs_dense=macs, params=params, params_dense=params)
    slimmed = slim_checkpoint(cfg, checkpoint, f"{work_dir}/slim")
    test = load_config(slimmed.config, work_dir=f"{work_dir}/test")
    test.load_from = slimmed.weights
    small = MODELS.build(test.model).eval()
    times = paired_times([dense, small], blank_example(dense, shape or slimmed.shape))
    return dict(
        test=test,
        macs=slimmed.macs_slim,
        macs_dense=slimmed.macs_dense,
        params=slimmed.params_slim,
        params_dense=slimmed.params_dense,
        dense_ms=round(statistics.median(times[:, 0].tolist()) / 1e6, 2),
        slimmed_ms=round(statistics.median(times[:, 1].tolist()) / 1e6, 2),
        speed_up=spread_of((times[:, 0] / times[:, 1]).tolist()),
    )


# -- the table


def rows() -> list[str]:
    """A line a config: means over its seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        figures = json.loads(file.read_text(encoding="utf-8"))
        runs.setdefault(figures["config"], []).append(figures)
    lines = [
        "| config | seeds | epochs | training, minutes | MMACs | parameters | AP | AP50 | AP50 under attack | speed-up |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in sorted(runs.items(), key=lambda item: len(item[0])):
        one = group[0]
        speed = mean(g["speed_up"]["median"] for g in group) if "speed_up" in one else None
        cells = [
            f"[{name}](../configs/bccd/{name}.py)",
            ", ".join(str(g["seed"]) for g in group),
            f"{one['epochs']}",
            f"{mean(g['train_seconds'] for g in group) / 60:.1f}",
            f"{mean(g['macs'] for g in group) / 1e6:,.1f} ({mean(g['macs'] / g['macs_dense'] for g in group):.3f})",
            f"{mean(g['params'] for g in group):,.0f}",
            *(f"{100 * mean(g['clean'][key] for g in group):.1f}" for key in AP),
            f"{100 * mean(g['attacked'][AP[1]] for g in group):.1f}",
            f"{speed:.2f}" if speed else "1",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if runs:
        one = next(iter(runs.values()))[0]
        lines += [
            "",
            f"{one['images']} test photos; attack: {one['attack']}, eps {one['eps']:g}/255; {one['machine']}.",
        ]
    return lines if runs else ["Not measured yet."]


def mean(values: Any) -> float:
    return statistics.fmean(values)


def table(args: argparse.Namespace) -> int:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0], 1)
    after = rest.split(MARKS[1], 1)[1]
    text = before + "\n".join([MARKS[0], "", *rows(), "", MARKS[1]]) + after
    if args.check and text != page:
        print(f"{PAGE.relative_to(ROOT)}: the table is not what benchmarks/bccd gives: run "
              "`python benchmarks/measured_detector.py table`", file=sys.stderr)  # fmt: skip
        return 1
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train, test and write the metrics file")
    running.add_argument("config")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--eps", type=float, default=2.0, help="size of the attack, pixels/255")
    running.add_argument("--work-dir", help="default: work_dirs/CONFIG_sSEED")
    running.add_argument("--metrics", help="default: benchmarks/bccd/CONFIG_sSEED.json")
    running.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    page = commands.add_parser("table", help="write the table in docs/own_data.md")
    page.add_argument("--check", action="store_true", help="fail if the table is not what the files give")
    args = parser.parse_args()
    if args.command == "table":
        return table(args)
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
