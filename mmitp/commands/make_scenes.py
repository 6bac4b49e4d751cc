"""Write generated road scenes in KITTI's format: images, labels and split files.

mmitp make-scenes --out data/scenes --frames 800 --seed 0 --size 384 128
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from mmitp.engine.cli import add_out, command, needs_out, parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    add_out(options, "folder to write (training/image_2, training/label_2, ImageSets)", metavar="DIR", positional=True)
    options.add_argument("--frames", type=int, required=True, help="number of frames")
    options.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    options.add_argument(
        "--size", type=int, nargs=2, metavar=("W", "H"), help="image size in pixels (default: KITTI's)"
    )
    options.add_argument("--val", type=float, default=0.25, help="share of the frames in ImageSets/val.txt")
    args = options.parse_args(argv)
    needs_out(options, args)

    from mmitp.datasets.scenes import KITTI_SIZE, write_scenes

    width, height = args.size or KITTI_SIZE
    start = time.perf_counter()
    root = write_scenes(args.out, args.frames, args.seed, (width, height), args.val)
    seconds = time.perf_counter() - start
    print(f"{args.frames} frames of {width} x {height} in {root} ({args.frames / seconds:.0f} frames/s)")
