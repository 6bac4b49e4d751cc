"""Evaluate a checkpoint: dense, masked or slimmed; clean, or under attack beside it.

    mmitp test CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options key=value ...] [--out FILE] [--show-dir DIR]
    mmitp test CONFIG CHECKPOINT --attack pgd --steps 20 --restarts 1 --eps 8 --alpha 2
    mmitp test CONFIG CHECKPOINT --attack autoattack --eps 8 --max-images 1000
    mmitp test CONFIG CHECKPOINT --attack fgsm --eps 0 2 4 8         # a sweep, with its curve

Sizes are in pixels/255 of the image before normalisation. docs/robustness.md explains the attacks. Result files say
what they were measured with (under "run"); a former file of the same name is moved aside, never overwritten.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from mmitp.engine.cli import (
    add_config,
    add_launcher,
    add_out,
    add_trust,
    command,
    non_negative,
    parser,
    positive,
)


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    add_config(options)
    options.add_argument("checkpoint", help="weights to evaluate")
    options.add_argument("--work-dir", help="where logs go (default: work_dirs/<config name>)")
    add_out(
        options,
        "write the metrics as JSON (with --attack by default WORK_DIR/robustness_ATTACK_CHECKPOINT.json); a sweep's "
        "curve beside it",
        "--json",
        metavar="FILE",
    )
    options.add_argument("--show-dir", metavar="DIR", help="draw every tested image with its predictions into DIR")
    options.add_argument(
        "--max-images", type=positive, metavar="N", help="test N images, spread evenly over the test set"
    )
    add_trust(options)
    add_launcher(options)
    group = options.add_argument_group("attack")
    group.add_argument("--attack", dest="name", choices=("fgsm", "fgsm_rs", "pgd", "autoattack"))
    group.add_argument("--eps", type=float, nargs="+", help="size or sizes, pixels/255")
    attack = [
        group.add_argument(
            "--alpha", type=float, help="step, pixels/255 (default: eps/4 for pgd, 1.25 eps for fgsm_rs)"
        ),
        group.add_argument("--steps", type=positive, help="pgd's steps (default 20)"),
        group.add_argument("--restarts", type=positive, help="pgd's random starts; the worst counts (default 1)"),
        group.add_argument("--norm", choices=("linf", "l2"), help="ball of the attack (default linf)"),
        group.add_argument(
            "--objective",
            choices=("truth", "own", "vanishing", "fabrication"),
            help="detectors: raise the training loss on the ground truth (default) or on the detector's own "
            "detections, or make objects vanish or appear",
        ),
        group.add_argument("--score-thr", type=non_negative, help="least score of a detection for 'own' (default 0.3)"),
        group.add_argument("--seed", type=int, help="of the random starts (default 0)"),
        group.add_argument("--pixel-range", type=non_negative, help="full white before normalisation (default 255)"),
    ]
    args = options.parse_args(argv)
    given = {a.dest: getattr(args, a.dest) for a in attack if getattr(args, a.dest) is not None}
    if (args.name is None) != (args.eps is None) or (given and args.name is None):
        options.error("--attack and --eps go together, and the attack's options with them")
    if args.name != "pgd" and {"steps", "restarts"} & given.keys():
        options.error("--steps and --restarts are --attack pgd's")
    if args.objective != "own" and args.score_thr is not None:
        options.error("--score-thr is --objective own's")
    if args.show_dir and args.name is not None:
        options.error("--show-dir draws the clean test: leave out --attack")

    from mmitp.engine.checkpoint import read_checkpoint
    from mmitp.engine.config import draw_predictions, load_config, require_keys
    from mmitp.engine.data_paths import check_data
    from mmitp.engine.results import check_writable, provenance, write_results
    from mmitp.engine.robust_eval import EvalAttack, RobustReport, build_test_runner, evaluate, tested_images
    from mmitp.engine.run import check_launcher, device_of
    from mmitp.models.slim_config import is_type

    settings = EvalAttack(name=args.name, **given) if args.name else None
    if settings is not None:
        settings.check(args.eps)  # before anything is read

    check_launcher(args.launcher, args.local_rank)
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    require_keys(cfg, ("model", "test_dataloader", "test_evaluator"), "to test on")
    if "://" not in args.checkpoint:
        read_checkpoint(args.checkpoint, args.trust)  # before the test set is
    check_data(cfg, ("test_dataloader", "test_evaluator"))
    if args.show_dir:
        draw_predictions(cfg, args.show_dir)
    out = args.out
    if settings is not None and out is None:
        network = Path(args.checkpoint)
        name = f"robustness_{settings.slug()}_{network.resolve().parent.name}_{network.stem}.json"
        out = os.path.join(cfg.work_dir, name)
    if out is not None:
        check_writable(out)
    run = provenance(
        config=args.config,
        checkpoint=args.checkpoint,
        slimmed=is_type(cfg.model, "SlimModel"),
        options=args.cfg_options or None,
    )

    cfg.launcher = args.launcher
    cfg.load_from = args.checkpoint
    runner = build_test_runner(cfg, args.max_images, args.trust)
    run |= dict(
        device=device_of(runner.model),
        seed=runner.seed,
        images=tested_images(runner.test_loop.dataloader),
        of_images=len(runner.test_loop.dataloader.dataset),
    )
    if settings is None:
        metrics = runner.test()
        lines = write_results(out, metrics, run) if out is not None and runner.rank == 0 else []
    else:

        def rescue(part: RobustReport) -> None:
            if runner.rank == 0:
                print(part.table())
                for line in [
                    *part.save(out, run),
                    f"eps {args.eps[len(part.eps)]:g} failed: these are the sizes before",
                ]:
                    print(line)

        report = evaluate(runner, settings, args.eps, rescue)
        if runner.rank != 0:
            return
        print(report.table())
        lines = report.save(out, run)
    for line in lines:
        print(line)
