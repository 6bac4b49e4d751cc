"""Train a config.

python tools/train.py configs/centernet_kitti_prune50.py [--work-dir DIR] [--resume [CKPT]] [--amp]
    [--cfg-options key=value ...] [--launcher pytorch] [--dry-run]

--resume goes on from the newest undamaged checkpoint of the work folder. --dry-run tries every phase of the run on a
few images in a temporary folder. docs/reliability.md says what is promised of both.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.cli import add_trust, command, parser
from mmitp.engine.config import load_config, require_keys
from mmitp.engine.data_paths import check_data
from mmitp.engine.dry_run import dry_run
from mmitp.engine.run import build_runner, check_launcher


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("config", help="config file, or mmdet::... / mmpretrain::...")
    options.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config name>)")
    options.add_argument(
        "--resume", nargs="?", const="auto", help="resume from the newest checkpoint, or from this one"
    )
    options.add_argument(
        "--dry-run", action="store_true", help="try one step of every phase in a temporary folder, and train nothing"
    )
    options.add_argument("--amp", action="store_true", help="train with automatic mixed precision")
    options.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override")
    add_trust(options)
    options.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    options.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))

    check_launcher(args.launcher)
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    require_keys(cfg, ("model", "train_dataloader", "train_cfg", "optim_wrapper"), "to train on")
    check_data(cfg, ("train_dataloader", "val_dataloader", "val_evaluator"))
    cfg.launcher = args.launcher
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    if args.dry_run:
        print(dry_run(cfg, args.trust))
        return
    build_runner(cfg, args.trust).train()


if __name__ == "__main__":
    sys.exit(main())
