"""Train a config.

    mmitp train CONFIG [--work-dir DIR] [--resume [CKPT]] [--amp] [--auto-scale-lr] [--cfg-options key=value ...]
        [--launcher pytorch] [--dry-run]

--resume goes on from the newest undamaged checkpoint of the work folder; where there is none, the run starts as it
would without, from the config's load_from if it has one. --dry-run tries every phase of the run on a few images in a
temporary folder. docs/reliability.md says what is promised of both.
"""

from collections.abc import Sequence

from mmitp.engine.cli import UserError, add_config, add_launcher, add_trust, command, parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    add_config(options)
    options.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config name>)")
    options.add_argument(
        "--resume", nargs="?", const="auto", help="resume from the newest checkpoint, or from this one"
    )
    options.add_argument(
        "--dry-run", action="store_true", help="try one step of every phase in a temporary folder, and train nothing"
    )
    options.add_argument("--amp", action="store_true", help="train with automatic mixed precision")
    options.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the batch size over all processes (the config's auto_scale_lr)",
    )
    add_trust(options)
    add_launcher(options)
    args = options.parse_args(argv)

    from mmengine.device import get_device

    from mmitp.engine.config import load_config, require_keys, scale_learning_rate
    from mmitp.engine.data_paths import check_data
    from mmitp.engine.dry_run import dry_run
    from mmitp.engine.resume import AUTO
    from mmitp.engine.run import build_runner, check_launcher
    from mmitp.engine.run_record import recorded

    check_launcher(args.launcher, args.local_rank)
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    require_keys(cfg, ("model", "train_dataloader", "train_cfg", "optim_wrapper"), "to train on")
    check_data(cfg, ("train_dataloader", "val_dataloader", "val_evaluator"))
    cfg.launcher = args.launcher
    if args.amp:
        if get_device() == "cpu":
            raise UserError("--amp: mixed precision (mmengine's AmpOptimWrapper) needs a GPU, and there is none here")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        scale_learning_rate(cfg)
    if args.resume:
        cfg.resume = args.resume if args.resume == AUTO else True
        if args.resume != AUTO:
            cfg.load_from = args.resume
    if args.dry_run:
        print(dry_run(cfg, args.trust))
        return
    runner = build_runner(cfg, args.trust)
    with recorded(runner, args.config):
        runner.train()
