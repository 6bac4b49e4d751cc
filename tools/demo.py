"""The main job from nothing: generate scenes, train and prune CenterNet-DLA34 on them, slim it, evaluate, draw.

    python tools/demo.py [--minutes 6] [--work-dir work_dirs/demo]

Runs tools/train.py on configs/demo/centernet_scenes_prune50.py. How many epochs fit into the given training time is
measured first, so that the whole takes about the same time on a fast and on a slow machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.datasets.scenes import write_scenes
from mmitp.engine.config import load_config
from mmitp.engine.run import build_runner
from mmitp.engine.slimming import slim_checkpoint
from mmitp.visualization import plot_budget, plot_channels, save_gt_vs_pred

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo" / "centernet_scenes_prune50.py"
SCENES = dict(frames=560, seed=0, size=[384, 128], val_fraction=0.2)
EPOCHS = (4, 16)
DIFFICULTIES = ("easy", "moderate", "hard")


def prepare_scenes(folder: Path) -> None:
    """Generates the scenes unless the very same ones are there already."""
    stamp = folder / "scenes.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == SCENES:
        print(f"scenes: {folder} is there already")
        return
    print(f"scenes: generating {SCENES['frames']} frames in {folder}", flush=True)
    start = time.perf_counter()
    write_scenes(folder, SCENES["frames"], SCENES["seed"], tuple(SCENES["size"]), SCENES["val_fraction"])  # type: ignore[arg-type]
    print(f"scenes: {time.perf_counter() - start:.0f} s", flush=True)


def seconds_per_step(overrides: list[str], work_dir: Path) -> tuple[float, int]:
    """Measures a training step after warm-up; returns (seconds, steps an epoch)."""
    cfg = load_config(str(CONFIG), overrides, str(work_dir / "timing"))
    cfg.custom_hooks = []
    cfg.visualizer.vis_backends = []
    cfg.log_level = "ERROR"
    runner = build_runner(cfg)
    runner.model.train()
    loader = runner.build_dataloader(cfg.train_dataloader)
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    runner.model.init_weights()
    times = []
    for _, batch in zip(range(5), loader, strict=False):
        start = time.perf_counter()
        runner.model.train_step(batch, optim_wrapper=wrapper)
        times.append(time.perf_counter() - start)
    return min(times[1:]), len(loader)


def evaluate(config: str, checkpoint: str, overrides: list[str], work_dir: Path, picture: Path | None = None) -> Any:
    """AP of a checkpoint on the held-out scenes; draws a few frames if a picture is asked for."""
    cfg = load_config(config, overrides, str(work_dir))
    cfg.load_from = checkpoint
    runner = build_runner(cfg)
    metrics = runner.test()
    if picture is not None:
        runner.model.eval()
        results = []
        for batch in runner.test_dataloader:
            with torch.no_grad():
                results += runner.model.test_step(batch)
            if len(results) >= 8:
                break
        save_gt_vs_pred(runner.test_dataloader.dataset, results, picture, n=6)
    return metrics


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """The newest run's logged training scalars."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda p: p.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "ops_kept" in row and "iter" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="training time aimed at")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"))
    parser.add_argument("--data", type=Path, default=Path("data/scenes"), help="where the scenes are generated")
    args = parser.parse_args()
    work_dir: Path = args.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)

    prepare_scenes(args.data)
    data = f"{args.data.as_posix()}/"
    overrides = [
        f"{loader}.dataset.data_root={data}" for loader in ("train_dataloader", "val_dataloader", "test_dataloader")
    ] + [f"{part}.data_root={data}" for part in ("val_evaluator", "test_evaluator")]

    step, steps_per_epoch = seconds_per_step(overrides, work_dir)
    epochs = int(args.minutes * 60 / (step * steps_per_epoch))
    epochs = min(max(epochs, EPOCHS[0]), EPOCHS[1])
    print(f"timing: {step:.2f} s a step, {steps_per_epoch} steps an epoch: {epochs} epochs", flush=True)
    schedule = [
        f"train_cfg.max_epochs={epochs}",
        f"train_cfg.val_interval={epochs}",
        f"param_scheduler.1.end={epochs}",
        f"custom_hooks.0.end={max(epochs * 7 // 10, 2)}",
        f"default_hooks.checkpoint.interval={epochs}",
    ]
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(CONFIG), "--work-dir", str(work_dir)]
    command += ["--cfg-options", *overrides, *schedule]
    print("training:", " ".join(command[1:]), flush=True)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    train_seconds = time.perf_counter() - start

    checkpoint = str(work_dir / f"epoch_{epochs}.pth")
    cfg = load_config(str(CONFIG), overrides + schedule)
    slimmed = slim_checkpoint(cfg, checkpoint, str(work_dir / "slim"))
    masked_metrics = evaluate(str(CONFIG), checkpoint, overrides + schedule, work_dir / "test_masked")
    picture = work_dir / "gt_vs_pred.png"
    slim_metrics = evaluate(slimmed.config, slimmed.weights, [], work_dir / "test_slim", picture)

    pruning = json.loads((work_dir / "pruning.json").read_text(encoding="utf-8"))
    rows = scalars(work_dir)
    plot_budget(
        [r["step"] for r in rows], [r["ops_kept"] for r in rows], work_dir / "budget.png", pruning["target"],
        [r["L_HW"] for r in rows],
    )  # fmt: skip
    layers = pruning["layers"]
    plot_channels(
        [r["name"] for r in layers], [r["in_kept"] for r in layers], [r["in_channels"] for r in layers],
        work_dir / "channels.png", "input channels kept",
    )  # fmt: skip

    def ap(metrics: dict[str, float], name: str) -> list[float]:
        return [round(float(metrics[f"kitti/{name}_R40_{d}"]), 4) for d in DIFFICULTIES]

    summary = dict(
        ap_car_r40=ap(masked_metrics, "Car"),
        ap_car_r40_slim=ap(slim_metrics, "Car"),
        ap_pedestrian_r40=ap(masked_metrics, "Pedestrian"),
        ap_cyclist_r40=ap(masked_metrics, "Cyclist"),
        macs_dense=slimmed.macs_dense,
        macs_slim=slimmed.macs_slim,
        params_dense=slimmed.params_dense,
        params_slim=slimmed.params_slim,
        ratio=slimmed.macs_slim / slimmed.macs_dense,
        target=pruning["target"],
        train_seconds=round(train_seconds, 1),
        epochs=epochs,
        picture=str(picture),
    )
    (work_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    print("\nAP (R40) on held-out generated scenes    easy   moderate   hard")
    for label, metrics, name in (
        ("Car, masked", masked_metrics, "Car"),
        ("Car, slimmed", slim_metrics, "Car"),
        ("Pedestrian, slimmed", slim_metrics, "Pedestrian"),
        ("Cyclist, slimmed", slim_metrics, "Cyclist"),
    ):
        easy, moderate, hard = ap(metrics, name)
        print(f"{label:<38}{easy:>8.2f}{moderate:>10.2f}{hard:>8.2f}")
    print(f"operations kept: {summary['ratio']:.4f} of {slimmed.macs_dense:,} MACs (target {summary['target']})")
    print(f"parameters: {slimmed.params_slim:,} of {slimmed.params_dense:,}")
    print(f"slimmed network: {slimmed.config}, {slimmed.weights}")
    print(f"pictures: {picture}, {work_dir / 'budget.png'}, {work_dir / 'channels.png'}")
    print(f"summary: {work_dir / 'summary.json'}")


if __name__ == "__main__":
    main()
