"""Slim a trained, pruned checkpoint: config and weights of a plain, smaller network.

    python tools/slim.py CONFIG CHECKPOINT OUT [--shape H W]

OUT/config.py and OUT/weights.pth load with tools/test.py, and with init_detector and its like.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.cli import add_trust, command, parser, positive
from mmitp.engine.config import load_config
from mmitp.engine.results import check_writable
from mmitp.engine.slim_checkpoint import slim_checkpoint


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("config", help="config the checkpoint was trained with")
    options.add_argument("checkpoint", help="checkpoint with masks")
    options.add_argument("out", help="folder to write")
    options.add_argument(
        "--shape", type=positive, nargs=2, metavar=("H", "W"), help="input size the MACs are stated for"
    )
    add_trust(options)
    args = options.parse_args(argv)
    check_writable(Path(args.out) / "config.py")
    print(slim_checkpoint(load_config(args.config), args.checkpoint, args.out, args.shape, trust=args.trust).text())


if __name__ == "__main__":
    sys.exit(main())
