"""Make a page about one run or several side by side, of what they left in their work folders.

    mmitp report work_dirs/dense work_dirs/pruned --out report/

OUT/index.html needs nothing else and no network; its tables stand in OUT/report.md and OUT/*.csv too. Dense and slimmed
networks are timed here, in turn, one thread. Give the dense run first: costs and configs are compared with it.
"""

from collections.abc import Sequence

from mmitp.engine.cli import add_trust, command, parser, positive


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    options.add_argument("runs", nargs="+", metavar="WORK_DIR", help="work folder of a run")
    options.add_argument("-o", "--out", default="report", help="folder to write (default: report)")
    options.add_argument("--title", help="of the page")
    options.add_argument(
        "--shape",
        type=positive,
        nargs=2,
        metavar=("H", "W"),
        help="input size to count and time at; default: a pruned run's",
    )
    options.add_argument("--no-timing", action="store_true", help="time nothing")
    options.add_argument(
        "--samples", type=int, default=4, metavar="N", help="test images with detections a run (default 4; 0: none)"
    )
    add_trust(options)
    args = options.parse_args(argv)

    from mmitp.report import read_run, write_report

    runs = [read_run(folder) for folder in args.runs]
    files = write_report(
        runs,
        args.out,
        title=args.title,
        shape=tuple(args.shape) if args.shape else None,
        timing=not args.no_timing,
        samples=args.samples,
        trust=args.trust,
    )
    print("\n".join(map(str, files)))
