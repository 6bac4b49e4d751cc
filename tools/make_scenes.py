"""Writes generated road scenes in KITTI's format: images, labels and split files.

python tools/make_scenes.py data/scenes --frames 800 --seed 0 --size 384 128
"""

from __future__ import annotations

import argparse
import sys
import time

from mmitp.datasets.scenes import KITTI_SIZE, write_scenes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write (training/image_2, training/label_2, ImageSets)")
    parser.add_argument("--frames", type=int, required=True, help="number of frames")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    parser.add_argument(
        "--size", type=int, nargs=2, default=KITTI_SIZE, metavar=("W", "H"), help="image size in pixels"
    )
    parser.add_argument("--val", type=float, default=0.25, help="share of the frames in ImageSets/val.txt")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        root = write_scenes(args.out, args.frames, args.seed, tuple(args.size), args.val)
    except ValueError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    print(f"{args.frames} frames of {args.size[0]} x {args.size[1]} in {root} ({args.frames / seconds:.0f} frames/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
