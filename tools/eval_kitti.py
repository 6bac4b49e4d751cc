"""KITTI 2D AP of a folder of result files, by the official rules; needs numpy only.

Without --split the frames are those of GT_DIR, and DT_DIR must hold a result file for each and for no other frame.
DT_DIR may hold the files itself or in a sub-folder ``data``, as a submission does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from mmitp.evaluation import kitti_ap
except ModuleNotFoundError as error:
    if error.name != "mmitp":
        raise
    # Run from a checkout that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mmitp.evaluation import kitti_ap
from mmitp.engine.cli import command, parser
from mmitp.engine.results import check_writable, provenance, write_results


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("gt_dir", metavar="GT_DIR", help="folder of label files (label_2)")
    options.add_argument("dt_dir", metavar="DT_DIR", help="folder of result files")
    options.add_argument("--split", metavar="FILE", help="frame ids to evaluate, one a line")
    options.add_argument(
        "--classes", nargs="+", default=list(kitti_ap.CLASSES), metavar="CLASS", help="default: all three"
    )
    options.add_argument(
        "--json",
        metavar="OUT",
        help='write {class: {"R11": [easy, moderate, hard], "R40": [...]}, "run": {...}}; a former file is moved aside',
    )
    args = options.parse_args(argv)

    if args.json:
        check_writable(args.json)
    frames = kitti_ap.read_split(args.split) if args.split else kitti_ap.list_frames(args.gt_dir, args.dt_dir)
    ground_truth, detections = kitti_ap.read_folders(args.gt_dir, args.dt_dir, frames)
    for what, count in (
        (f"{args.gt_dir}: labels", kitti_ap.unknown_classes(ground_truth)),
        (f"{args.dt_dir}: detections", kitti_ap.unknown_classes(detections)),
    ):
        if count:
            print(f"warning: {what} {kitti_ap.describe_unknown(count)}", file=sys.stderr)
    result = kitti_ap.evaluate(ground_truth, detections, args.classes)

    print(f"{len(frames)} frames" + (f" of split {args.split}" if args.split else ""))
    print(kitti_ap.format_table(result))
    skipped = [name for name, ap in result.items() if ap is None]
    if skipped:
        print(f"- not evaluated: no detections of {', '.join(skipped)}")
    if args.json:
        run = provenance(images=len(frames), labels=args.gt_dir, detections=args.dt_dir, split=args.split)
        print("\n".join(write_results(args.json, kitti_ap.as_json(result), run)))


if __name__ == "__main__":
    sys.exit(main())
