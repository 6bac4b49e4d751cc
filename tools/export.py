"""Export a checkpoint for other runtimes, and check the file against torch.

    python tools/export.py CONFIG CHECKPOINT OUT [--shape H W] [--batch N]

OUT ends in .onnx, .pt2 (torch.export) or .pt (TorchScript). Dense, masked (slimmed on the way) and slimmed networks of
classifiers and CenterNet, deformable convolutions included; other single-stage detectors with their head's raw outputs;
no two-stage ones. .pt and .pt2 need torch alone to be loaded, and .pt2 takes by far the longest to write. Fails unless
the outputs agree with torch to 1e-4 of each output's largest value, at two batch sizes (one with --batch). ONNX needs
pip install "mmitp[export]".
"""

import sys
from collections.abc import Sequence

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.cli import add_trust, command, parser, positive
from mmitp.engine.config import load_config
from mmitp.engine.export import export_checkpoint
from mmitp.engine.results import check_writable


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("config", help="config of the checkpoint; of a slimmed network, its own config.py")
    options.add_argument("checkpoint", help="weights, with or without masks")
    options.add_argument("out", help="file to write: .onnx, .pt2 or .pt")
    options.add_argument(
        "--shape", type=positive, nargs=2, metavar=("H", "W"), help="input size; default: the training's"
    )
    options.add_argument("--batch", type=positive, metavar="N", help="fixed batch size; default: any")
    add_trust(options)
    args = options.parse_args(argv)
    check_writable(args.out)
    print(
        export_checkpoint(
            load_config(args.config), args.checkpoint, args.out, args.shape, args.batch, trust=args.trust
        ).text()
    )


if __name__ == "__main__":
    sys.exit(main())
