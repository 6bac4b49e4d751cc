"""Full 300-epoch schedules on CIFAR-10: the paper's rows and their controls, several at once on one GPU.

    python benchmarks/gpu/cifar_full.py [--minutes 8] [--rows psi20_b50 ...] [--seeds 0 1] [--together 4] [--bf16]

Every row is a config of configs/cifar10, trained by :mod:`cifar_run` with its steps captured in CUDA graphs; what
differs is the loop alone. ``--together`` runs share the GPU, each on a stream of its own, the next one beginning where
one ends. When the time is over or the script is told to stop, every run ends its epoch and is saved; the same command
goes on. ``OUT/cifar_full/RUN.json`` has a run's curve and figures, ``RUN.pth`` its weights (tools/test.py reads
them) and all that going on needs. Copy both to go on elsewhere.

One part, ``runs``, in ``OUT/cifar_full.json``; the rows in their order:
"""

from __future__ import annotations

import argparse
import json
import signal
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import evidence  # first: makes the other scripts importable
from evidence import Bench, Part, Unfinished

MINUTES = 8.0
#: Seconds that are left for ending an epoch and saving when the time is over.
ENDING = 12.0
#: Seconds between two saves of a run.
SAVE_EVERY = 30.0
PGD = ((20, 1), (50, 10))
WIDE = ("model.backbone.base_channels=32", "model.head.in_channels=128")


def narrow(*widths: int) -> tuple[str, str]:
    """Options of a control: the stages' widths, found as ``narrow_widths`` in sweep.py finds them."""
    listed = ",".join(map(str, widths))
    return f"model.backbone.base_channels=({listed})", f"model.head.in_channels={widths[-1]}"


class RowSpec(NamedTuple):
    """A row as the command line shows it; fields as :class:`cifar_run.Row`'s."""

    name: str
    config: str
    options: tuple[str, ...] = ()
    clean_weight: float = 0.0
    robust: bool = False
    control: bool = False


BRIEF = ("custom_hooks.0.begin=1", "custom_hooks.0.end=2")

ROWS = (
    RowSpec("dense", "resnet20_cifar10"),
    RowSpec("psi30_early", "resnet20_cifar10_psi30_early"),
    RowSpec("narrow30", "resnet20_cifar10", narrow(9, 17, 34), control=True),
    RowSpec("psi20_b50", "resnet20_cifar10_psi20_b50"),
    RowSpec("psi20_b10", "resnet20_cifar10_psi20_b10"),
    RowSpec("narrow20", "resnet20_cifar10", narrow(7, 14, 29), control=True),
    RowSpec("psi30_brief", "resnet20_cifar10_psi30_early", BRIEF),
    RowSpec("fastat", "resnet20_cifar10_fastat", robust=True),
    RowSpec("fastat_psi50", "resnet20_cifar10_fastat_psi50", robust=True),
    RowSpec("fastat_half", "resnet20_cifar10_fastat", (), 0.5, True),
    RowSpec("fastat_psi50_half", "resnet20_cifar10_fastat_psi50", (), 0.5, True),
    RowSpec("resnet56_psi20", "resnet56_cifar10_psi20_b50"),
    RowSpec("fastat_wide", "resnet20_cifar10_fastat", WIDE, 0.0, True),
    RowSpec("fastat_psi50_wide", "resnet20_cifar10_fastat_psi50", WIDE, 0.0, True),
    RowSpec("resnet56_psi50_early", "resnet56_cifar10_psi50_early"),
    RowSpec("resnet56_narrow50", "resnet56_cifar10", narrow(11, 23, 45), control=True),
)


def published(config: str) -> dict[str, Any]:
    """What the paper reports of a config, by the titles of the committed tables; empty where it reports nothing."""
    for name in ("cifar10_published", "cifar10_fastat_published"):
        table = json.loads((evidence.ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        titles = [column["title"] for column in table["columns"]]
        for row in table["rows"]:
            if row[0] == config:
                told = zip(titles, row, strict=True)
                return {title: value for title, value in told if title.endswith(", paper") and value is not None}
    return {}


__doc__ += "\n".join(f"    {r.name:<22} {r.config}{' ' if r.options else ''}{' '.join(r.options)}" for r in ROWS)


def options(parser: argparse.ArgumentParser) -> None:
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--together", type=int, default=4, help="runs that share the GPU")
    parser.add_argument("--bf16", action="store_true", help="autocast in bfloat16 (attacks stay in float32)")
    parser.add_argument("--data-root", default="data/cifar10", help="folder of cifar-10-batches-py")


def parts(args: argparse.Namespace) -> list[Part]:
    return [Part("runs", partial(train_rows, args=args), 1e9)]


class Told:
    """Whether somebody has asked this process to stop."""

    def __init__(self) -> None:
        self.now = False
        signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, *_: Any) -> None:
        self.now = True


def train_rows(bench: Bench, args: argparse.Namespace) -> None:
    """The part: all runs that are not finished, in order, as far as the time goes."""
    import torch
    from cifar_run import Attack, Data, Row
    from toys import cifar10

    told = Told()
    folder = bench.out / "cifar_full"
    root, real = cifar10(bench.out, bench.dry, args.data_root)
    if not (real or bench.dry):
        raise ValueError(f"CIFAR-10 is not in {args.data_root} (data/README.md says where it goes)")
    torch.backends.cudnn.benchmark = True
    data = Data.load(root, bench.device)
    about = evidence.about(bench.device)
    wanted = []
    for seed in args.seeds:
        for spec in (r for r in ROWS if r.name in args.rows):
            attacks = tuple(Attack(*(min(n, 2) for n in pgd) if bench.dry else pgd) for pgd in PGD if spec.robust)
            told_of = {} if spec.control else published(spec.config)
            row = Row(spec.name, spec.config, spec.options, spec.clean_weight, told_of, attacks, spec.control)
            wanted.append(partial(start, row, seed, data, bench, folder, args.bf16, about))
    left = share(wanted, args.together, bench, told)
    if left:
        raise Unfinished(f"{len(left)} of {len(wanted)} runs go on with the same command: {', '.join(left)}")


def start(row: Any, seed: int, data: Any, bench: Bench, folder: Path, bf16: bool, about: dict[str, Any]) -> Any:
    """The run of a row, from where it was."""
    from cifar_run import Run, config_of

    cfg = config_of(row)
    if bench.dry:
        shorten(cfg)
    look = 2 if bench.dry else 20
    return Run(row, seed, data, bench.device, folder, cfg, bench.device == "cuda", bf16, about, look)


def shorten(cfg: Any) -> None:
    """A config at toy size: ResNet-8, three epochs of batches of 16, all phases of its schedule among them."""
    epochs = 3
    factor = epochs / cfg.train_cfg.max_epochs
    cfg.train_cfg.max_epochs = epochs
    cfg.train_dataloader.batch_size = 16
    cfg.param_scheduler.milestones = [max(round(m * factor), 1) for m in cfg.param_scheduler.milestones]
    cfg.model.backbone.depth = 8
    for hook in cfg.get("custom_hooks") or []:
        if hook.type == "mmitp.PruneHook":
            hook.update(begin=1, end=2, target=max(hook.target, 0.5))  # what eight layers can meet


def share(wanted: Sequence[Any], together: int, bench: Bench, told: Any) -> list[str]:
    """Works off runs, so many at a time, a step of each in turn; returns the names of those that are not finished.

    Args:
        wanted: functions that make a run.
        together: how many share the device.
        bench: where the runs' states are written down, and until when there is time.
        told: its ``now`` says that somebody wants this to stop.

    Raises:
        RuntimeError: a run failed; the others are done or saved by then.
    """
    queue, left = list(wanted), []
    active: list[Any] = []
    states: dict[str, Any] = {}
    errors: dict[str, str] = {}
    saved = time.monotonic()

    def note(name: str, **figures: Any) -> None:
        states.setdefault(name, {}).update(figures)
        bench.note(runs=states)

    while queue or active:
        stopping = told.now or bench.left() < ENDING
        while queue and len(active) < together and not stopping:
            run = queue.pop(0)()
            if run.finished:
                note(run.name, state="finished", **run.state.figures)
                continue
            evidence.synchronize(bench.device)  # it was built on another stream than it will run on
            active.append((run, run.work(), stream_of(bench.device)))
            note(run.name, state="running", epoch=run.state.epoch)
            stopping = told.now or bench.left() < ENDING
        if stopping:
            left += [name_of(make) for make in queue]
            queue = []
        due = time.monotonic() - saved > SAVE_EVERY
        for entry in list(active):
            run, work, stream = entry
            try:
                with stream:
                    at_rest = next(work)
                    while (stopping or due) and not at_rest:
                        at_rest = next(work)
                    if at_rest:
                        run.state.beside.append(len(active))
                        note(run.name, epoch=run.state.epoch, **run.state.figures)
                    if at_rest and (stopping or due or run.finished):
                        run.save()
            except Exception as error:
                told_error = traceback.format_exc()
                print(told_error, flush=True)
                errors[run.name] = f"{type(error).__name__}: {error}"
                note(run.name, state="failed", error=told_error[-1500:])
                active.remove(entry)
                if bench.device == "cuda" and "CUDA" in str(error):
                    raise  # every run of this process is lost from its last save on
                continue
            if run.finished and at_rest:
                note(run.name, state="finished", **run.state.figures)
                active.remove(entry)
            elif stopping:
                note(run.name, state="stopped")
                left.append(run.name)
                active.remove(entry)
        if due:
            saved = time.monotonic()
    if errors:
        raise RuntimeError("; ".join(f"{name}: {error}" for name, error in errors.items()))
    return left


def name_of(make: Any) -> str:
    """The name of a run that was not made yet."""
    row, seed = make.args[:2]
    return f"{row.name}_s{seed}"


def stream_of(device: str) -> Any:
    """A context that puts work on a stream of its own."""
    import torch

    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


if __name__ == "__main__":
    evidence.main(__doc__, __file__, parts, MINUTES, options)
