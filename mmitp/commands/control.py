"""Write a pruned config's control: the same network built narrower, to train beside it.

    mmitp control CONFIG --out DIR [--target PSI] [--divisor N] [--weights FILE | --scratch] [--shape H W]

Every tensor keeps the same part of its channels, so that the whole model is at the target of CONFIG's PruneHook. Of the
weights that CONFIG starts from, the channels with the largest L1 norms are taken along; where it starts from random
ones, so does the control. Then: mmitp train DIR/config.py, for as long as the pruned run takes.
"""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from mmitp.engine.cli import add_config, add_out, add_trust, command, needs_out, parser, positive


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    add_config(options)
    add_out(options, "folder to write", metavar="DIR")
    options.add_argument("--target", type=float, metavar="PSI", help="part of the operations to keep (PruneHook's)")
    options.add_argument("--divisor", type=_divisor, metavar="N", help="number, or 'auto' (PruneHook's)")
    start = options.add_mutually_exclusive_group()
    start.add_argument("--weights", metavar="FILE", help="dense checkpoint to start from (CONFIG's load_from)")
    start.add_argument("--scratch", action="store_true", help="start from random weights")
    options.add_argument(
        "--shape", type=positive, nargs=2, metavar=("H", "W"), help="input size the MACs are stated for"
    )
    add_trust(options)
    args = options.parse_args(argv)
    needs_out(options, args)

    from mmitp.engine.config import load_config
    from mmitp.engine.narrow import narrow_control
    from mmitp.engine.results import check_writable

    check_writable(Path(args.out) / "config.py")
    cfg = load_config(args.config, args.cfg_options)
    report = narrow_control(
        cfg, args.out, args.target, args.divisor, args.weights, args.scratch, args.shape, trust=args.trust
    )
    print(report.text())


def _divisor(text: str) -> int | str:
    """A number of channels, or 'auto'."""
    if text == "auto":
        return text
    try:
        return positive(text)
    except ValueError:
        raise ArgumentTypeError(f"must be 'auto' or a whole number of at least 1, got {text!r}") from None
