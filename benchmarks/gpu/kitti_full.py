"""CenterNet-DLA34 at 384x1280 on KITTI-1348, dense and pruned, by mmengine's Runner: a part of the schedule at a time.

    python benchmarks/gpu/kitti_full.py [--minutes 10] [--epochs 60] [--data-root data/kitti/] [--no-amp]

The configs are configs/kitti/centernet_dla34_kitti.py, ..._prune50.py and ..._prune50_fisher.py, their 250 epochs'
schedule shortened to ``--epochs`` in proportion (drops of the learning rate, pruning window). The parts, ``dense``,
``pruned`` and ``fisher``, are saved after every epoch; when the time is over or the script is told to stop, the epoch
is finished and the same command goes on. After the first epochs ``minutes_expected`` says how long the whole part
takes; AP (KITTI-1348, R40) is taken at the end and at every quarter. ``OUT/kitti_full/PART`` is the work folder: copy
it to go on elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import evidence  # first: makes the other scripts importable
from cifar_full import ENDING, Told
from evidence import ROOT, Bench, Part, Unfinished

MINUTES = 10.0
CONFIGS = dict(
    dense="centernet_dla34_kitti",
    pruned="centernet_dla34_kitti_prune50",
    fisher="centernet_dla34_kitti_prune50_fisher",
)
#: the configs' own length
WHOLE = 250


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, default=60, help="of each part (default: %(default)s)")
    parser.add_argument("--data-root", default="data/kitti/")
    parser.add_argument("--workers", type=int, default=12, help="processes that load frames")
    parser.add_argument("--no-amp", action="store_true", help="train in single precision")
    parser.add_argument("--seed", type=int, default=0)


def parts(args: argparse.Namespace) -> list[Part]:
    return [Part(name, partial(train, config=config, args=args), 1e9) for name, config in CONFIGS.items()]


def shortened(cfg: Any, epochs: int) -> None:
    """The schedule in proportion; a config's own length is left as it is."""
    factor = epochs / WHOLE
    cfg.train_cfg.update(max_epochs=epochs, val_interval=max(epochs // 4, 1))
    for scheduler in cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]:
        if "milestones" in scheduler:
            scheduler.milestones = [max(round(m * factor), 1) for m in scheduler.milestones]
    for hook in cfg.get("custom_hooks") or []:
        if hook.type == "mmitp.PruneHook":
            begin = max(round(hook.begin * factor), 1)
            hook.update(begin=begin, end=max(round(hook.end * factor), begin + 1))


def config_of(bench: Bench, config: str, args: argparse.Namespace) -> Any:
    """The part's config at its size, with its data."""
    from first_contact import amp, narrow

    from mmitp.datasets.scenes import write_scenes
    from mmitp.engine.config import load_config

    cfg = load_config(str(ROOT / f"configs/kitti/{config}.py"), work_dir=str(bench.out / "kitti_full" / bench.name))
    root, workers, epochs = args.data_root.rstrip("/") + "/", args.workers, args.epochs
    if bench.dry:
        narrow(cfg)
        root, workers, epochs = (
            f"{write_scenes(bench.out / 'scenes6', 6, seed=1, size=(192, 64), val_fraction=0.34)}/",
            0,
            3,
        )
    elif not (Path(root) / "ImageSets/train.txt").is_file():
        raise ValueError(f"{root} has no frames of KITTI (data/README.md says where they go; --data-root)")
    shortened(cfg, epochs)
    for split in ("train", "val", "test"):
        loader = cfg[f"{split}_dataloader"]
        loader.dataset.data_root = root
        if split != "train":
            cfg[f"{split}_evaluator"].data_root = root
        loader.update(num_workers=workers, persistent_workers=workers > 0, pin_memory=bench.device == "cuda")
        if bench.dry:
            loader.batch_size = 2
    if not args.no_amp:
        amp(cfg, bench.device)
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1)
    cfg.log_level, cfg.randomness, cfg.resume = "WARNING", dict(seed=args.seed), True
    cfg.experiment_name = f"kitti_full_{bench.name}_{time.time_ns()}"
    return cfg


def train(bench: Bench, config: str, args: argparse.Namespace) -> None:
    """A part: on from the last epoch's checkpoint, as far as the time goes."""
    from mmengine.hooks import Hook

    from mmitp.engine.run import build_runner

    told = Told()

    class Watch(Hook):
        """Notes every epoch, and ends the run after one, once it is saved, when it is time to."""

        priority = "LOWEST"  # after the checkpoint

        def before_train_epoch(self, runner: Any) -> None:
            self.since = time.perf_counter()

        def after_train_epoch(self, runner: Any) -> None:
            evidence.synchronize(bench.device)
            done, seconds = runner.epoch + 1, time.perf_counter() - self.since
            curve = [entry for entry in bench.known("curve", []) if entry["epoch"] < done]
            scalars = runner.message_hub.log_scalars
            entry = dict(
                epoch=done,
                seconds=round(seconds, 2),
                loss=round(float(scalars["train/loss"].mean(len(runner.train_dataloader))), 4),
            )
            if "train/ops_kept" in scalars:
                entry["ops_kept"] = round(float(scalars["train/ops_kept"].current()), 4)
            curve.append(entry)
            pace = statistics.median(e["seconds"] for e in curve[-20:])
            bench.note(
                curve=curve,
                epochs=runner.max_epochs,
                minutes_expected=round(pace * runner.max_epochs / 60, 2),
                minutes_left=round(pace * (runner.max_epochs - done) / 60, 2),
                images_per_second=round(len(runner.train_dataloader) * runner.train_dataloader.batch_size / pace, 1),
                peak_gib=evidence.peak_memory(bench.device),
            )
            if done < runner.max_epochs and (told.now or bench.left() < ENDING + 2 * seconds):
                raise Unfinished(f"{done} of {runner.max_epochs} epochs, about {pace:.1f} s each")

        def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
            found = {k: round(float(v), 2) for k, v in (metrics or {}).items() if "R40" in k}
            bench.note(ap={**bench.known("ap", {}), str(runner.epoch): found})

    runner = build_runner(config_of(bench, config, args))
    runner.register_hook(Watch())
    runner.train()
    if str(runner.max_epochs) not in bench.known("ap", {}):  # it was stopped between the last epoch and this
        runner.val_loop.run()
    for hook in runner.hooks:
        if type(hook).__name__ == "PruneHook":
            bench.note(ops_kept=hook._ratio())


if __name__ == "__main__":
    evidence.main(__doc__, __file__, parts, MINUTES, options)
