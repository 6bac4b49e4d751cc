"""Whether pruning runs behave like the published ones: each sign of S1 and S2, with the figures it is judged by.

    python tools/check_signs.py WORK_DIR... [--plot L_HW.png]

Reads the logs (*/vis_data/scalars.json) and pruning.json of every folder. '-' means that the sign says nothing about
the run (no drop of the learning rate, another b), or that the run has not got there.
"""

import sys
from collections.abc import Sequence

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.cli import command, parser
from mmitp.engine.results import check_writable
from mmitp.engine.signs import check_signs, read_run
from mmitp.visualization import plot_hw_losses


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("work_dirs", nargs="+", metavar="WORK_DIR")
    options.add_argument("--plot", help="picture of L_HW over the time of all runs")
    args = options.parse_args(argv)
    if args.plot:
        check_writable(args.plot)
    runs = [read_run(folder) for folder in args.work_dirs]
    for run in runs:
        print(f"{run.name}: psi* {run.target:g}, b {run.b}, window {run.begin:g} to {run.end:g}, M from {run.init:g}")
        for sign in check_signs(run):
            print(f"  {'-' if sign.shows is None else 'yes' if sign.shows else 'no':>3}  {sign.name}: {sign.figures}")
    if args.plot:
        print(plot_hw_losses({run.name: (run.times, run.hw_loss) for run in runs}, args.plot))


if __name__ == "__main__":
    sys.exit(main())
