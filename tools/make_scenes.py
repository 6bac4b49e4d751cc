"""Writes generated road scenes in KITTI's format: images, labels and split files.

python tools/make_scenes.py data/scenes --frames 800 --seed 0 --size 384 128
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from mmitp.datasets.scenes import KITTI_SIZE, write_scenes
from mmitp.engine.cli import command, parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("out", help="folder to write (training/image_2, training/label_2, ImageSets)")
    options.add_argument("--frames", type=int, required=True, help="number of frames")
    options.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    options.add_argument(
        "--size", type=int, nargs=2, default=KITTI_SIZE, metavar=("W", "H"), help="image size in pixels"
    )
    options.add_argument("--val", type=float, default=0.25, help="share of the frames in ImageSets/val.txt")
    args = options.parse_args(argv)
    start = time.perf_counter()
    root = write_scenes(args.out, args.frames, args.seed, tuple(args.size), args.val)
    seconds = time.perf_counter() - start
    print(f"{args.frames} frames of {args.size[0]} x {args.size[1]} in {root} ({args.frames / seconds:.0f} frames/s)")


if __name__ == "__main__":
    sys.exit(main())
