"""KITTI 2D AP of a folder of result files, by the official rules; needs numpy only.

Without --split the frames are those of GT_DIR, and DT_DIR must hold a result file for each and for no other frame.
DT_DIR may hold the files itself or in a sub-folder ``data``, as a submission does.

--bootstrap gives every figure the 95 % interval of 1,000 draws of the frames with replacement, each evaluated by the
official rules. --versus evaluates a second detector on the same frames and gives DT_DIR's figures minus its, with the
interval of the difference in the same draws. --overlap 0.5 counts looser boxes than the official 0.7 for cars.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmitp.engine.cli import add_out, command, parser, positive
from mmitp.engine.results import check_writable, provenance, write_results
from mmitp.evaluation import kitti_ap, kitti_bootstrap


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    options.add_argument("gt_dir", metavar="GT_DIR", help="folder of label files (label_2)")
    options.add_argument("dt_dir", metavar="DT_DIR", help="folder of result files")
    options.add_argument("--split", metavar="FILE", help="frame ids to evaluate, one a line")
    options.add_argument(
        "--classes", nargs="+", default=list(kitti_ap.CLASSES), metavar="CLASS", help="default: all three"
    )
    add_out(
        options,
        'write {class: {"R11": [easy, moderate, hard], "R40": [...]}, "run": {...}}; --bootstrap adds '
        "R11_interval and R40_interval, --versus versus and difference; a former file is moved aside",
        "--json",
    )
    options.add_argument("--versus", metavar="OTHER_DIR", help="result files to compare with; implies --bootstrap")
    options.add_argument(
        "--bootstrap",
        nargs="?",
        type=positive,
        const=kitti_bootstrap.DRAWS,
        metavar="N",
        help=f"intervals from N draws of the frames, {kitti_bootstrap.DRAWS} where N is left out",
    )
    options.add_argument(
        "--overlap",
        type=float,
        metavar="IOU",
        help="overlap that a detection has to exceed, for every class; official: 0.7 for cars, 0.5 for the others",
    )
    options.add_argument("--seed", type=int, default=0, help="of the draws, default 0")
    args = options.parse_args(argv)
    if args.versus and args.bootstrap is None:
        args.bootstrap = kitti_bootstrap.DRAWS
    if args.seed < 0:
        options.error(f"--seed must be at least 0, got {args.seed}")

    if args.out:
        check_writable(args.out)
    folders = [args.dt_dir, *([args.versus] if args.versus else [])]
    frames = kitti_ap.read_split(args.split) if args.split else kitti_ap.list_frames(args.gt_dir, args.dt_dir)
    if args.versus and not args.split:
        kitti_ap.list_frames(args.gt_dir, args.versus)
    results = []
    for folder in folders:
        ground_truth, detections = kitti_ap.read_folders(args.gt_dir, folder, frames)
        results.append(detections)
    _warn(f"{args.gt_dir}: labels", ground_truth)
    for folder, detections in zip(folders, results, strict=True):
        _warn(f"{folder}: detections", detections)

    print(f"{len(frames)} frames" + (f" of split {args.split}" if args.split else ""))
    if args.overlap is not None:
        print(f"not the official figures: boxes count above an overlap of {args.overlap:g}, for every class")
    evaluated = [kitti_ap.evaluate(ground_truth, detections, args.classes, args.overlap) for detections in results]
    figures = [kitti_ap.as_json(result) for result in evaluated]
    written: dict = dict(figures[0])
    if not args.bootstrap:
        print(kitti_ap.format_table(evaluated[0]))
    else:
        print(f"in parentheses the {kitti_bootstrap.PERCENT} % interval of {args.bootstrap} draws, seed {args.seed}")
        times = kitti_bootstrap.draw_frames(len(frames), args.bootstrap, args.seed)
        chosen = (times, args.classes, args.overlap)
        draws = [kitti_bootstrap.bootstrap(ground_truth, detections, *chosen) for detections in results]
        tables = [kitti_bootstrap.with_intervals(*pair) for pair in zip(figures, draws, strict=True)]
        written = dict(tables[0])
        print(kitti_bootstrap.format_table(tables[0], "2D AP (%)"))
        if args.versus:
            change = kitti_bootstrap.with_intervals(
                kitti_bootstrap.figures_difference(*figures), kitti_bootstrap.difference(*draws)
            )
            written |= {"versus": tables[1], "difference": change}
            print(f"\n{args.versus}\n" + kitti_bootstrap.format_table(tables[1], "2D AP (%)"))
            print(f"\n{args.dt_dir} minus {args.versus}")
            print(kitti_bootstrap.format_table(change, "difference", signed=True))
    for folder, result in zip(folders, evaluated, strict=True):
        skipped = [name for name, ap in result.items() if ap is None]
        if skipped:
            where = f" in {folder}" if args.versus else ""
            print(f"- not evaluated: no detections of {', '.join(skipped)}{where}")
    if args.out:
        drawn = dict(draws=args.bootstrap, seed=args.seed, percent=kitti_bootstrap.PERCENT) if args.bootstrap else None
        run = provenance(
            images=len(frames),
            labels=args.gt_dir,
            detections=args.dt_dir,
            versus=args.versus,
            split=args.split,
            overlap=args.overlap,
            bootstrap=drawn,
        )
        print("\n".join(write_results(args.out, written, run)))


def _warn(what: str, frames: Sequence[kitti_ap.GroundTruth] | Sequence[kitti_ap.Detections]) -> None:
    count = kitti_ap.unknown_classes(frames)
    for phrase in [kitti_ap.describe_unknown(count)] * bool(count) + kitti_ap.describe_odd(frames):
        print(f"warning: {what} {phrase}", file=sys.stderr)
