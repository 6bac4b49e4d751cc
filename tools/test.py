"""Evaluate a checkpoint: dense, masked or slimmed.

python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options key=value ...] [--json OUT]
"""

import argparse
import json
import os

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.config import load_config
from mmitp.engine.run import build_runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file, or mmdet::... / mmpretrain::...")
    parser.add_argument("checkpoint", help="weights to evaluate")
    parser.add_argument("--work-dir", help="where logs go (default: work_dirs/<config name>)")
    parser.add_argument("--json", metavar="OUT", help="write the metrics as JSON")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not os.path.isfile(args.checkpoint) and "://" not in args.checkpoint:
        parser.error(f"no checkpoint file {args.checkpoint!r}")

    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    cfg.launcher = args.launcher
    cfg.load_from = args.checkpoint
    metrics = build_runner(cfg).test()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({k: float(v) for k, v in metrics.items()}, file, indent=1)


if __name__ == "__main__":
    main()
