"""Whether pruning runs behave like the published ones, sign by sign, with the figures.

    mmitp check-signs WORK_DIR... [--out L_HW.png]

The signs are those of the paper's supplement (S1) and of its talk's slides (S2). Reads the logs
(*/vis_data/scalars.json) and pruning.json of every folder. '-' means that the sign says nothing about the run (no drop
of the learning rate, another b), or that the run has not got there.
"""

from collections.abc import Sequence

from mmitp.engine.cli import add_out, command, parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    options.add_argument("work_dirs", nargs="+", metavar="WORK_DIR")
    add_out(options, "picture of L_HW over the time of all runs", "--plot", metavar="PNG")
    args = options.parse_args(argv)

    from mmitp.engine.results import check_writable
    from mmitp.engine.signs import check_signs, read_run
    from mmitp.files import told_apart
    from mmitp.visualization import plot_hw_losses

    if args.out:
        check_writable(args.out)
    runs = [read_run(folder) for folder in args.work_dirs]
    if args.out and len({run.unit for run in runs}) > 1:
        units = ", ".join(f"{run.name}: {run.unit}s" for run in runs)
        raise ValueError(f"one picture has one axis of time, and these windows count differently ({units})")
    for run, name in zip(runs, told_apart(args.work_dirs), strict=True):
        run.name = name
    for run in runs:
        print(f"{run.name}: psi* {run.target:g}, b {run.b}, window {run.begin:g} to {run.end:g}, M from {run.init:g}")
        for sign in check_signs(run):
            print(f"  {'-' if sign.shows is None else 'yes' if sign.shows else 'no':>3}  {sign.name}: {sign.figures}")
    if args.out:
        print(plot_hw_losses({run.name: (run.times, run.hw_loss) for run in runs}, args.out, runs[0].unit))
