"""Slim a trained, pruned checkpoint: config and weights of a plain, smaller network.

    python tools/slim.py CONFIG CHECKPOINT OUT [--shape H W]

OUT/config.py and OUT/weights.pth load with tools/test.py, and with init_detector and its like.
"""

import argparse
import sys

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.config import load_config
from mmitp.engine.slimming import slim_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config the checkpoint was trained with")
    parser.add_argument("checkpoint", help="checkpoint with masks")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("H", "W"), help="input size the MACs are stated for")
    args = parser.parse_args()
    try:
        report = slim_checkpoint(load_config(args.config), args.checkpoint, args.out, args.shape)
    except ValueError as error:
        sys.exit(f"slim.py: {error}")
    print(report.text())


if __name__ == "__main__":
    main()
