"""Trains a detector's config as ``tools/train.py`` does, and writes down what the run costs and what it gives.

    python benchmarks/detector_run.py configs/kitti/centernet_dla34x025_kitti1348_short_prune50.py \\
        --dense configs/kitti/centernet_dla34x025_kitti1348_short.py --shape 160 512 --seed 0
        [--start WEIGHTS.pth] [--work-dir DIR] [--metrics FILE.json] [--cfg-options KEY=VALUE ...]

As ``measured.py`` for classifiers: after every epoch the metrics file gets processor seconds of training alone and the
operations and parameters kept (of the ``--dense`` config's, at ``--shape``), after every validation the AP. A stopped
run goes on from its last checkpoint. On KITTI all figures with their bootstrap intervals come at the end, and the
detections lie in ``results/`` of the work dir in the official format. ``--start`` names weights to start from, in place
of random ones.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from measured import Task, configured, finish, measured_run, metrics_file, origin, sizes, start_from  # first: see there
from mmengine import Config
from mmengine.registry import MODELS, init_default_scope

from mmitp.commands import eval_kitti
from mmitp.engine.config import load_config

#: evaluator -> mmengine's name of the figure that a run is judged by, and its factor to percent
FIGURES = {"mmitp.KittiMetric": ("kitti/Car_R40_moderate", 1.0), "CocoMetric": ("coco/bbox_mAP", 100.0)}


def evaluator(cfg: Config) -> Any:
    """The validation's only evaluator.

    Raises:
        SystemExit: there are several, or it is none of :data:`FIGURES`.
    """
    found = cfg.val_evaluator if isinstance(cfg.val_evaluator, (list, tuple)) else [cfg.val_evaluator]
    kind = found[0].type.removeprefix("mmdet.")
    if len(found) != 1 or kind not in FIGURES:
        raise SystemExit(f"{cfg.filename}: val_evaluator must be one of {', '.join(FIGURES)}, and a single one")
    return found[0]


def dense_sizes(config: str, shape: tuple[int, int]) -> dict[str, int]:
    cfg = load_config(config)
    init_default_scope(cfg.default_scope)
    return sizes(MODELS.build(cfg.model), shape)


def kitti_intervals(cfg: Config, results: Path) -> dict[str, Any]:
    """The figures of result files with their bootstrap intervals, as ``mmitp eval-kitti --out`` writes them."""
    metric, split = evaluator(cfg), Path(cfg.val_dataloader.dataset.data_root) / cfg.val_dataloader.dataset.ann_file
    out = results.with_suffix(".json")
    words = [str(Path(metric.get("data_root", "")) / metric.get("label_dir", "training/label_2")), str(results)]
    with contextlib.redirect_stdout(io.StringIO()):
        eval_kitti.main([*words, "--split", str(split), "--bootstrap", "--out", str(out)])
    figures = json.loads(out.read_text(encoding="utf-8"))
    return {name: rounded(figures[name]) for name in figures if name != "run"}


def rounded(values: Any) -> Any:
    """Figures to two decimals, at any depth."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return round(values, 2) if isinstance(values, float) else values


def train(args: argparse.Namespace) -> None:
    cfg = configured(args, args.config)
    metric = evaluator(cfg)
    kind = metric.type.removeprefix("mmdet.")
    figure, scale = FIGURES[kind]
    task = Task(tuple(args.shape), figure, "ap", scale)
    results = Path(cfg.work_dir) / "results"
    if kind == "mmitp.KittiMetric":
        metric.outfile_prefix = str(results)
    dense = dense_sizes(args.dense or args.config, task.shape)
    head = dict(
        config=Path(args.config).stem,
        options=args.cfg_options,
        seed=args.seed,
        **start_from(cfg, args.start),
        **origin(),
        shape=list(args.shape),
        figure=figure,
        macs_dense=dense["macs"],
        params_dense=dense["params"],
    )
    path = metrics_file(args, cfg)
    result = measured_run(cfg, path, head, task=task)
    more = {"figures": kitti_intervals(cfg, results)} if kind == "mmitp.KittiMetric" else {}
    finish(path, result, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--dense", help="config of the network that ratios refer to (default: the config itself)")
    parser.add_argument("--shape", nargs=2, type=int, required=True, metavar=("H", "W"))
    parser.add_argument("--start", metavar="WEIGHTS", help="to start from; random ones where it is left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config name>)")
    parser.add_argument("--metrics", help="the metrics file (default: metrics.json in the work dir)")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.set_defaults(data_root=None, batches=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
