"""Slim a trained, pruned checkpoint: config and weights of a plain, smaller network.

    mmitp slim CONFIG CHECKPOINT --out DIR [--shape H W]

DIR/config.py and DIR/weights.pth load with mmitp test, and with init_detector and its like.
"""

from collections.abc import Sequence
from pathlib import Path

from mmitp.engine.cli import add_config, add_out, add_trust, command, needs_out, parser, positive


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    add_config(options, "config the checkpoint was trained with")
    options.add_argument("checkpoint", help="checkpoint with masks")
    add_out(options, "folder to write", metavar="DIR", positional=True)
    options.add_argument(
        "--shape", type=positive, nargs=2, metavar=("H", "W"), help="input size the MACs are stated for"
    )
    add_trust(options)
    args = options.parse_args(argv)
    needs_out(options, args)

    from mmitp.engine.config import load_config
    from mmitp.engine.results import check_writable
    from mmitp.engine.slim_checkpoint import slim_checkpoint

    check_writable(Path(args.out) / "config.py")
    cfg = load_config(args.config, args.cfg_options)
    print(slim_checkpoint(cfg, args.checkpoint, args.out, args.shape, trust=args.trust).text())
