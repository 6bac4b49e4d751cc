"""KITTI 2D AP of a folder of result files, by the official rules; needs numpy only.

Without --split the frames are those of GT_DIR, and DT_DIR must hold a result file for each and for no other frame.
DT_DIR may hold the files itself or in a sub-folder ``data``, as a submission does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

try:
    from mmitp.evaluation import kitti_ap
except ModuleNotFoundError as error:
    if error.name != "mmitp":
        raise
    # Run from a checkout that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mmitp.evaluation import kitti_ap


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (0, or 1 after printing what is wrong with the files)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gt_dir", metavar="GT_DIR", help="folder of label files (label_2)")
    parser.add_argument("dt_dir", metavar="DT_DIR", help="folder of result files")
    parser.add_argument("--split", metavar="FILE", help="frame ids to evaluate, one a line")
    parser.add_argument(
        "--classes", nargs="+", default=list(kitti_ap.CLASSES), metavar="CLASS", help="default: all three"
    )
    parser.add_argument("--json", metavar="OUT", help='write {class: {"R11": [easy, moderate, hard], "R40": [...]}}')
    args = parser.parse_args(argv)

    try:
        frames = kitti_ap.read_split(args.split) if args.split else kitti_ap.list_frames(args.gt_dir, args.dt_dir)
        result = kitti_ap.evaluate_folders(args.gt_dir, args.dt_dir, frames, args.classes)
        if args.json:
            text = json.dumps(kitti_ap.as_json(result), indent=2, allow_nan=False)
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    print(f"{len(frames)} frames" + (f" of split {args.split}" if args.split else ""))
    print(kitti_ap.format_table(result))
    skipped = [name for name, ap in result.items() if ap is None]
    if skipped:
        print(f"- not evaluated: no detections of {', '.join(skipped)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
