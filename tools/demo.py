"""The main job from nothing: generate scenes, train and prune CenterNet-DLA34 on them, slim it, evaluate, draw.

    python tools/demo.py [--minutes 6] [--work-dir work_dirs/demo]

Runs tools/train.py on configs/demo/centernet_scenes_prune50.py. How many epochs fit into the given training time is
measured first, so that the whole takes about the same time on a fast and on a slow machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.datasets.scenes import write_scenes
from mmitp.engine.cli import command, non_negative, parser
from mmitp.engine.config import load_config
from mmitp.engine.results import check_writable, provenance, write_results
from mmitp.engine.robust_eval import tested_images
from mmitp.engine.run import build_runner, device_of
from mmitp.engine.signs import logged
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.visualization import plot_budget, plot_channels, save_gt_vs_pred

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo" / "centernet_scenes_prune50.py"
SCENES = dict(frames=560, seed=0, size=[384, 128], val_fraction=0.2)
EPOCHS = (4, 16)
DIFFICULTIES = ("easy", "moderate", "hard")


def prepare_scenes(folder: Path) -> None:
    """Generates the scenes unless the very same ones are there already."""
    stamp = folder / "scenes.json"
    if (folder / "training" / "image_2").is_dir() and stamp.is_file() and _stamped(stamp) == SCENES:
        print(f"scenes: {folder} is there already")
        return
    print(f"scenes: generating {SCENES['frames']} frames in {folder}", flush=True)
    start = time.perf_counter()
    write_scenes(folder, SCENES["frames"], SCENES["seed"], tuple(SCENES["size"]), SCENES["val_fraction"])  # type: ignore[arg-type]
    print(f"scenes: {time.perf_counter() - start:.0f} s", flush=True)


def _stamped(stamp: Path) -> Any:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError:  # cut off, or somebody else's
        return None


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


def evaluate(
    config: str, checkpoint: str, overrides: list[str], work_dir: Path, picture: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """AP of a checkpoint on the held-out scenes, and with what; draws a few frames if a picture is asked for."""
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
    images = tested_images(runner.test_loop.dataloader)
    return metrics, provenance(
        config=config, checkpoint=checkpoint, device=device_of(runner.model), images=images, seed=runner.seed
    )


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """The newest run's logged training scalars."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda p: p.stat().st_mtime)
    return [row for row in logged(newest) if "ops_kept" in row and "iter" in row]


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--minutes", type=non_negative, default=6.0, help="training time aimed at")
    options.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"))
    options.add_argument("--data", type=Path, default=Path("data/scenes"), help="where the scenes are generated")
    args = options.parse_args(argv)
    work_dir: Path = args.work_dir
    out = check_writable(work_dir / "summary.json")

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
    training = [sys.executable, str(ROOT / "tools" / "train.py"), str(CONFIG), "--work-dir", str(work_dir)]
    training += ["--cfg-options", *overrides, *schedule]
    print("training:", " ".join(training[1:]), flush=True)
    start = time.perf_counter()
    if status := subprocess.run(training).returncode:
        return status  # it has said why
    train_seconds = time.perf_counter() - start

    checkpoint = str(work_dir / f"epoch_{epochs}.pth")
    cfg = load_config(str(CONFIG), overrides + schedule)
    slimmed = slim_checkpoint(cfg, checkpoint, str(work_dir / "slim"))
    masked_metrics, _ = evaluate(str(CONFIG), checkpoint, overrides + schedule, work_dir / "test_masked")
    picture = work_dir / "gt_vs_pred.png"
    slim_metrics, run = evaluate(slimmed.config, slimmed.weights, [], work_dir / "test_slim", picture)

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
    written = write_results(out, summary, run)

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
    print("summary:", "\n".join(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
