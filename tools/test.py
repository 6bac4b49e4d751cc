"""Evaluate a checkpoint: dense, masked or slimmed; clean, or under attack beside it.

python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options key=value ...] [--json OUT]
python tools/test.py CONFIG CHECKPOINT --attack pgd --steps 20 --restarts 1 --eps 8 --alpha 2
python tools/test.py CONFIG CHECKPOINT --attack autoattack --eps 8 --max-images 1000
python tools/test.py CONFIG CHECKPOINT --attack fgsm --eps 0 2 4 8         # a sweep, with its curve

Sizes are in pixels/255 of the image before normalisation. docs/robustness.md explains the attacks.
"""

import argparse
import json
import os

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.checkpoint import read_checkpoint
from mmitp.engine.config import load_config
from mmitp.engine.robust_eval import EvalAttack, build_test_runner, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file, or mmdet::... / mmpretrain::...")
    parser.add_argument("checkpoint", help="weights to evaluate")
    parser.add_argument("--work-dir", help="where logs go (default: work_dirs/<config name>)")
    parser.add_argument(
        "--json",
        metavar="OUT",
        help="write the metrics as JSON (with --attack by default WORK_DIR/robustness.json); a sweep's curve beside it",
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="test N images, spread evenly over the test set")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    group = parser.add_argument_group("attack")
    group.add_argument("--attack", dest="name", choices=("fgsm", "fgsm_rs", "pgd", "autoattack"))
    group.add_argument("--eps", type=float, nargs="+", help="size or sizes, pixels/255")
    attack = [
        group.add_argument(
            "--alpha", type=float, help="step, pixels/255 (default: eps/4 for pgd, 1.25 eps for fgsm_rs)"
        ),
        group.add_argument("--steps", type=int, help="pgd's steps (default 20)"),
        group.add_argument("--restarts", type=int, help="pgd's random starts; the worst counts (default 1)"),
        group.add_argument("--norm", choices=("linf", "l2"), help="ball of the attack (default linf)"),
        group.add_argument(
            "--objective",
            choices=("truth", "own", "vanishing", "fabrication"),
            help="detectors: raise the training loss on the ground truth (default) or on the detector's own "
            "detections, or make objects vanish or appear",
        ),
        group.add_argument("--score-thr", type=float, help="least score of a detection for 'own' (default 0.3)"),
        group.add_argument("--seed", type=int, help="of the random starts (default 0)"),
        group.add_argument("--pixel-range", type=float, help="full white before normalisation (default 255)"),
    ]
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if "://" not in args.checkpoint:
        try:
            read_checkpoint(args.checkpoint)  # before the test set is
        except ValueError as error:
            parser.error(str(error))
    given = {a.dest: getattr(args, a.dest) for a in attack if getattr(args, a.dest) is not None}
    if (args.name is None) != (args.eps is None) or (given and args.name is None):
        parser.error("--attack and --eps go together, and the attack's options with them")
    if args.name != "pgd" and {"steps", "restarts"} & given.keys():
        parser.error("--steps and --restarts are --attack pgd's")
    if args.objective != "own" and args.score_thr is not None:
        parser.error("--score-thr is --objective own's")

    try:
        cfg = load_config(args.config, args.cfg_options, args.work_dir)
        attack_settings = EvalAttack(name=args.name, **given) if args.name else None
        if attack_settings is not None:
            attack_settings.check(args.eps)  # before the test set is read
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        os.makedirs(os.path.dirname(args.json) or ".", exist_ok=True)
    cfg.launcher = args.launcher
    cfg.load_from = args.checkpoint
    runner = build_test_runner(cfg, args.max_images)
    if attack_settings is None:
        metrics = runner.test()
        if args.json and runner.rank == 0:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({k: float(v) for k, v in metrics.items()}, file, indent=1)
        return
    try:
        report = evaluate(runner, attack_settings, args.eps)
    except ValueError as error:
        parser.error(str(error))
    if runner.rank == 0:
        print(report.table())
        for path in report.save(args.json or os.path.join(cfg.work_dir, "robustness.json")):
            print(path)


if __name__ == "__main__":
    main()
