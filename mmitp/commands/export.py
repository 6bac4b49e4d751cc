"""Export a checkpoint for other runtimes, and check the file against torch.

    mmitp export CONFIG CHECKPOINT --out FILE [--shape H W] [--batch N] [--gather]

FILE ends in .onnx, .pt2 (torch.export) or .pt (TorchScript). Dense, masked (slimmed on the way) and slimmed networks of
classifiers and CenterNet, deformable convolutions included; other single-stage detectors with their head's raw outputs;
no two-stage ones. .pt and .pt2 need torch alone to be loaded, and .pt2 takes by far the longest to write. Fails unless
the outputs agree with torch to 1e-4 of each output's largest value, at two batch sizes (one with --batch). ONNX needs
pip install -e ".[export]".
"""

from collections.abc import Sequence

from mmitp.engine.cli import add_config, add_out, add_trust, command, needs_out, parser, positive


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    add_config(options, "config of the checkpoint; of a slimmed network, its own config.py")
    options.add_argument("checkpoint", help="weights, with or without masks")
    add_out(options, "file to write: .onnx, .pt2 or .pt", metavar="FILE", positional=True)
    options.add_argument(
        "--shape", type=positive, nargs=2, metavar=("H", "W"), help="input size; default: the training's"
    )
    options.add_argument("--batch", type=positive, metavar="N", help="fixed batch size; default: any")
    options.add_argument(
        "--gather", action="store_true", help="keep gathers: fewer operations, but some runtimes (ncnn) have none"
    )
    add_trust(options)
    args = options.parse_args(argv)
    needs_out(options, args)

    from mmitp.engine.config import load_config
    from mmitp.engine.export import export_checkpoint
    from mmitp.engine.results import check_writable

    check_writable(args.out)
    cfg = load_config(args.config, args.cfg_options)
    report = export_checkpoint(
        cfg, args.checkpoint, args.out, args.shape, args.batch, trust=args.trust, gathers=args.gather
    )
    print(report.text())
