"""ResNet-20 on CIFAR-10, short schedule: every row of the comparison in configs/cifar10/README.md, at equal cost.

    python benchmarks/sweep.py run [--only PATTERN ...] [--jobs 1] [--nice 15] [--work DIR] [--data-root DIR]
    python benchmarks/sweep.py status [--only PATTERN ...]
    python benchmarks/sweep.py cost [--only PATTERN ...] [--rounds 30]
    python benchmarks/sweep.py latency [--only PATTERN ...] [--rounds 100] [--work DIR]
    python benchmarks/sweep.py table [--write | --check]

``run`` goes through the declared runs (:func:`declared`) in their order, one thread and one process each, N at a time.
Each writes its metrics file, ``benchmarks/cifar_sweep/NAME.json``, as it goes, and these files are committed: a
finished run is never repeated, a stopped one goes on from its last checkpoint in ``--work``. (Where a run needs another
one's weights, and ``--work`` has lost them, that is trained again; its metrics file stays as it is.) To stop, end the
driver by SIGTERM or Ctrl-C; it ends its runs. A run whose config or package is not there is named and left out;
Torch-Pruning and Only-Train-Once may be installed for an interpreter of their own (``--python-rivals``). ``table``
prints the tables from the metrics files, ``--write`` puts them between the marks in configs/cifar10/README.md, and
``--check`` fails where the README says something else.

Equal cost means the processor time of whole training runs, without validation: that of the dense network's 10 epochs.
Machines are shared, and the processor time of one and the same run differs by a fifth from day to day, so no row's
length is taken from such totals. It is taken from relative costs of a training step, measured in pairs in one process
(``cost``, as whole_run.py does; all are committed in ``cifar_sweep/costs.json``, and of several measurements, which
differ by up to a seventh, the median counts): a control's epochs are 10 over its step's cost, rounded, in its config,
by the measurements there were when it was run; Torch-Pruning's fine-tuning, the random structures and Only-Train-Once
measure theirs when they start and note it in their metrics file. The tables' "cost" is the run's length times these
steps' costs over 10 dense epochs, and the seconds beside it are what the machine made of it. Rows "three times as long"
have three times the epochs, the dense one too.

``latency`` times the networks that finished runs left in ``--work``, one image, one thread, beside the dense network in
every round, and adds it to their metrics files.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
METRICS = ROOT / "benchmarks/cifar_sweep"
README = ROOT / "configs/cifar10/README.md"
BEGIN, END = "<!-- sweep:begin -->", "<!-- sweep:end -->"
DENSE = "resnet20_cifar10_short"
DENSE_EPOCHS = 10
#: length of our runs that start from public weights, and the time that the others have, in epochs of the dense network
TRAINED_EPOCHS, TRAINED_TIME = 4, 2.6
#: the public checkpoint resnet20-12fca82f (configs/cifar10/README.md) as mmitp convert-resnet-cifar writes it
PUBLIC = "data/resnet20.pth"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: of its metrics file and work folder.
        row: the table's row; runs of a row differ by seed only.
        target: fraction of the operations.
        seed: of everything random.
        script: in ``benchmarks/``.
        args: of the script; ``{work}`` and ``{out}`` stand for the folders. Seed, folders and data are added.
        config: config that has to exist, without ``.py``.
        needs: run that has to be finished first, on the same machine (it leaves ``weights.pth``).
        package: module that has to be importable.
        shown: whether it has a row of its own.
        times: length over that of the config; rows of different lengths stand in different tables.
        start: weights that it starts from, where it does, relative to the repository; such rows have a table of their
            own.
    """

    name: str
    row: str
    target: float
    seed: int
    script: str
    args: tuple[str, ...]
    config: str
    needs: str | None = None
    package: str | None = None
    shown: bool = True
    times: int = 1
    start: str | None = None

    @property
    def altered(self) -> bool:
        """Whether it trains other than its config says: its steps have costs of their own."""
        return self.start is not None or "--cfg-options" in self.args


def trained(name: str, row: str, target: float, seed: int, config: str, *options: str, shown: bool = True) -> Run:
    args = (f"configs/cifar10/{config}.py", *options)
    return Run(f"{name}_s{seed}", row, target, seed, "measured.py", args, config, shown=shown)


def control(percent: int, seed: int) -> Run:
    row = "uniform widths from epoch 0 (control)"
    return trained(f"narrow{percent}", row, percent / 100, seed, f"resnet20_cifar10_narrow{percent}_short")


def late(percent: int, seed: int) -> Run:
    row = "narrower early, wider late from epoch 0 (control)"
    return trained(f"late{percent}", row, percent / 100, seed, f"resnet20_cifar10_late{percent}_short")


def half(percent: int, seed: int) -> Run:
    row = "half of every width from epoch 0 (control)"
    return trained(f"half{percent}", row, percent / 100, seed, f"resnet20_cifar10_half{percent}_short")


def found(percent: int, seed: int) -> Run:
    row = "the stage widths that the default finds, from epoch 0 (control)"
    return trained(f"found{percent}", row, percent / 100, seed, f"resnet20_cifar10_found{percent}_short")


def dense(seed: int) -> Run:
    return trained("dense", "dense", 1.0, seed, DENSE)


def plain(percent: int, seed: int) -> Run:
    row = "ours, plain mode (S2: b = 10, late freeze)"
    return trained(f"psi{percent}", row, percent / 100, seed, f"resnet20_cifar10_psi{percent}_short")


def early(percent: int, seed: int) -> Run:
    row = "ours, masks of single layers (early freeze, slimmed on the way)"
    name = f"psi{percent}_early_auto"
    return trained(name, row, percent / 100, seed, f"resnet20_cifar10_{name}_short")


def first_early(percent: int, seed: int) -> Run:
    row = "ours, masks of single layers, window of one epoch, multiples of 8"
    return trained(f"psi{percent}_early", row, percent / 100, seed, f"resnet20_cifar10_psi{percent}_early_short")


def brief(percent: int, seed: int) -> Run:
    row = "ours, default (masks tied over streams, window of half an epoch, slimmed on the way)"
    name = f"psi{percent}_brief"
    return trained(name, row, percent / 100, seed, f"resnet20_cifar10_{name}_short")


def fisher(percent: int, seed: int) -> Run:
    row = "ours, as the default with push='fisher'"
    options = ("--cfg-options", "custom_hooks.0.push=fisher")
    return trained(
        f"psi{percent}_fisher", row, percent / 100, seed, f"resnet20_cifar10_psi{percent}_brief_short", *options
    )


def from_trained(
    push: str, percent: int, seed: int, tied: bool = True, window: tuple[float, float] = (0.25, 0.75)
) -> Run:
    """A few epochs from the public ResNet-20, the window (in epochs) inside the first one.

    Not tied, every layer has masks of its own, in the steps of ``divisor="auto"``. What is left has gathers, whose
    steps take longer, hence an epoch less.
    """
    masks = "masks tied over streams" if tied else "masks of single layers"
    told, name = {
        (0.25, 0.75): ("window of half an epoch", ""),
        (0, 0.5): ("window of the first half epoch", "_first"),
        (0, 0.25): ("window of the first quarter epoch", "_quarter"),
    }[window]
    row = f"ours, push='{push}' ({masks}, {told}, slimmed on the way)"
    epochs = TRAINED_EPOCHS if tied else TRAINED_EPOCHS - 1
    options = (f"begin={window[0] / epochs:g}", f"end={window[1] / epochs:g}", f"push={push}")
    words = ("--epochs", str(epochs), "--start", PUBLIC, "--cfg-options", "param_scheduler.0.eta_max=0.05")
    words += tuple(f"custom_hooks.0.{option}" for option in options)
    if not tied:
        words += ("custom_hooks.0.divisor=auto", "model.prune.share=None")
    config = f"resnet20_cifar10_psi{percent}_brief_short"
    name = f"trained{percent}_{push}{'' if tied else '_single'}{name}"
    return replace(trained(name, row, percent / 100, seed, config, *words), start=PUBLIC)


def narrowed_trained(percent: int, seed: int) -> Run:
    """Built narrower from the same weights, for as long: a step costs 0.6 of a dense one (``costs.json``)."""
    row = "every tensor narrower, from the channels of the largest L1 norms (control)"
    epochs = str(TRAINED_EPOCHS)
    words = ("--epochs", epochs, "--start", PUBLIC, "--narrow", str(percent / 100))
    words += ("--cfg-options", "param_scheduler.0.eta_max=0.05")
    return replace(trained(f"trained{percent}_narrow", row, percent / 100, seed, DENSE, *words), start=PUBLIC)


def torch_pruning_trained(ranking: str, percent: int, seed: int) -> Run:
    """Torch-Pruning on the same weights, fine-tuned in as much time from the same rate."""
    args = ("--dense-weights", PUBLIC, "--ratio", str(percent / 100), "--ranking", ranking)
    args += ("--lr", "0.05", "--epochs", str(TRAINED_TIME))
    name, row = f"trained{percent}_tp_{ranking}_s{seed}", TORCH_PRUNING[ranking]
    package = "torch_pruning"
    return Run(name, row, percent / 100, seed, "torch_pruning_cifar.py", args, DENSE, package=package, start=PUBLIC)


def tied(percent: int, seed: int) -> Run:
    row = "ours, masks tied over streams, window of one epoch"
    name = f"psi{percent}_tied"
    return trained(name, row, percent / 100, seed, f"resnet20_cifar10_{name}_short")


def stream(percent: int, seed: int) -> Run:
    row = "ours, window of one epoch, multiples of 8, one mask for the readers of each stage's stream"
    name = f"psi{percent}_early_stream"
    return trained(name, row, percent / 100, seed, f"resnet20_cifar10_{name}_short")


def distilled(percent: int, seed: int) -> Run:
    row = "ours, default, learning from its own average after the window (distillation)"
    name = f"psi{percent}_brief_distill"
    return trained(name, row, percent / 100, seed, f"resnet20_cifar10_{name}_short")


def first_slim(percent: int, seed: int) -> Run:
    row = "ours, slimmed on the way from epoch 4 of 12, divisor 8"
    return trained(f"psi{percent}_slim", row, percent / 100, seed, f"resnet20_cifar10_psi{percent}_slim_short")


def random_structure(percent: int, seed: int) -> Run:
    row = "random widths inside the blocks from epoch 0 (control)"
    options = ("--random-structure", str(percent / 100))
    return trained(f"random{percent}", row, percent / 100, seed, DENSE, *options)


def torch_pruning_dense(seed: int) -> Run:
    row = "Torch-Pruning's dense phase, 7 epochs"
    return trained("tp_dense7", row, 1.0, seed, DENSE, "--epochs", "7", shown=False)


TORCH_PRUNING = {
    "l1": "Torch-Pruning, L1, all layers compete",
    "uniform": "Torch-Pruning, uniform",
    "taylor": "Torch-Pruning, Taylor, all layers compete",
}


def torch_pruning(ranking: str, percent: int, seed: int) -> Run:
    row = TORCH_PRUNING[ranking]
    first = torch_pruning_dense(seed).name
    args = ("--dense-metrics", f"{{out}}/{first}.json", "--dense-weights", f"{{work}}/{first}/weights.pth")
    args += ("--ratio", str(percent / 100), "--ranking", ranking, "--epochs", str(DENSE_EPOCHS))
    name = f"tp_{ranking}{percent}_s{seed}"
    package = "torch_pruning"
    return Run(name, row, percent / 100, seed, "torch_pruning_cifar.py", args, DENSE, needs=first, package=package)


def only_train_once(percent: int, seed: int) -> Run:
    args = (f"configs/cifar10/{DENSE}.py", "--ratio", str(percent / 100))
    row = "Only-Train-Once (HESSO)"
    package = "only_train_once"
    return Run(f"oto{percent}_s{seed}", row, percent / 100, seed, "oto_cifar.py", args, DENSE, package=package)


def declared() -> list[Run]:
    """All runs, in the order in which they are worked off."""
    runs = [
        # the default beside its rival to fear first, seed by seed
        *(run(30, seed) for seed in (0, 1) for run in (control, brief)),
        *(run(percent, seed) for seed in (0, 1) for percent in (50, 15) for run in (control, brief)),
        *(run(percent, 2) for percent in (30, 50, 15) for run in (control, brief)),
        *(run(30, seed) for seed in (0, 1) for run in (half, found)),
        *(longer(run, 3) for run in (brief(30, 0), control(30, 0), dense(0))),
        *(fisher(percent, seed) for seed in (0, 1) for percent in (30, 15, 50)),
        *(from_trained(push, 30, seed) for seed in (0, 1) for push in ("fisher", "balanced")),
        *(from_trained("fisher", 30, seed, tied=False) for seed in (0, 1)),
        *(from_trained("fisher", 30, seed, window=(0, end)) for seed in (0, 1) for end in (0.5, 0.25)),
        *(narrowed_trained(30, seed) for seed in (0, 1)),
        *(
            run
            for percent in (15, 50)
            for seed in (0, 1)
            for run in (from_trained("fisher", percent, seed, window=(0, 0.25)), narrowed_trained(percent, seed))
        ),
        *(torch_pruning_trained(ranking, 30, seed) for seed in (0, 1) for ranking in TORCH_PRUNING),
        *(tied(30, seed) for seed in (0, 1)),
        *(early(30, seed) for seed in (0, 1)),
        late(30, 0),
        late(30, 1),
        stream(30, 0),
        stream(30, 1),
        first_early(30, 0),
        *(distilled(30, seed) for seed in (0, 1)),
        *(dense(seed) for seed in (2, 0, 1)),
        *(torch_pruning_dense(seed) for seed in (0, 1)),
        *(torch_pruning(ranking, 15, seed) for seed in (0, 1) for ranking in ("l1", "uniform")),
        torch_pruning_dense(2),
        *(torch_pruning(ranking, percent, 2) for percent in (30, 50) for ranking in ("l1", "uniform")),
        *(plain(percent, 2) for percent in (30, 50)),
        *(random_structure(30, seed) for seed in (0, 1)),
        *(only_train_once(30, seed) for seed in (0, 1)),
        # seeds 0 and 1 of earlier commits, transcribed: never run again while their files are there
        *(torch_pruning(r, percent, seed) for percent in (50, 30) for r in ("l1", "uniform") for seed in (0, 1)),
        *(plain(percent, seed) for percent in (50, 30) for seed in (0, 1)),
        *(first_slim(50, seed) for seed in (0, 1)),
    ]
    return runs


def longer(run: Run, times: int) -> Run:
    """The run in so many times its epochs, its window with it."""
    name = f"{run.name.removesuffix(f'_s{run.seed}')}_x{times}_s{run.seed}"
    row = run.row.replace("window of half an epoch", f"window of {times / 2:g} epochs")
    return replace(run, name=name, row=row, args=(*run.args, "--times", str(times)), times=times)


def macs_of(widths: tuple[int, int, int], classes: int = 10) -> int:
    """Multiplications of ResNet-20 with these stage widths on 32x32 images."""
    a, b, c = widths
    convolutions = 1024 * (3 * a + 6 * a * a) + 256 * (a * b + 5 * b * b) + 64 * (b * c + 5 * c * c)
    return 9 * convolutions + classes * c


def narrow_widths(target: float) -> tuple[int, int, int]:
    """The stage widths nearest to ``target`` from below, of those that are one share of (16, 32, 64), up or down.

    That is, widths (a, b, c) for which there is a share s with every width at most a channel away from s times the full
    one. Of all of them the one of most operations not above the target.
    """
    full = (16, 32, 64)
    best, found = 0, (1, 1, 1)
    for widths in itertools.product(*(range(1, n + 1) for n in full)):
        low = max((w - 1) / n for w, n in zip(widths, full, strict=True))
        high = min((w + 1) / n for w, n in zip(widths, full, strict=True))
        triple = (widths[0], widths[1], widths[2])
        if low < high and best < (macs := macs_of(triple)) <= target * macs_of(full):
            best, found = macs, triple
    return found


# -- the state of the runs


def read(out: Path, name: str) -> dict[str, Any] | None:
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def selected(runs: Iterable[Run], patterns: list[str] | None) -> list[Run]:
    """The runs whose name matches one of the patterns (shell globs; a plain word matches beginnings)."""
    if not patterns:
        return list(runs)
    chosen = [r for r in runs if any(fnmatch.fnmatch(r.name, p if "*" in p else f"{p}*") for p in patterns)]
    if not chosen:
        raise SystemExit(f"--only {' '.join(patterns)}: no declared run has such a name; 'status' lists them")
    return chosen


@dataclass
class Job:
    run: Run
    process: subprocess.Popen
    log: TextIO
    since: float = field(default_factory=time.monotonic)


class Sweep:
    """Works off runs.

    Args:
        runs: all declared ones, in their order.
        out: folder of the metrics files.
        work: folder of logs and checkpoints.
        data_root: given to the scripts, if any.
        python_rivals: interpreter of the runs with a ``package``; by default this one.
        configs: folder of the runs' configs.
        figure: name of a run's result in its metrics file.
    """

    def __init__(
        self,
        runs: list[Run],
        out: Path,
        work: Path,
        data_root: str | None = None,
        python_rivals: str | None = None,
        configs: Path = ROOT / "configs/cifar10",
        figure: str = "accuracy",
    ) -> None:
        self.runs = {run.name: run for run in runs}
        self.configs, self.figure = configs, figure
        self.out, self.work, self.data_root = out, work, data_root
        self.python_rivals = python_rivals or sys.executable

    def finished(self, run: Run) -> bool:
        known = read(self.out, run.name)
        return known is not None and known["state"] == "finished"

    def wanted(self, chosen: list[Run]) -> list[Run]:
        """The chosen runs that are not finished, each behind the one it needs."""
        queue: list[Run] = []
        for run in chosen:
            if self.finished(run):
                continue
            if run.needs is not None:
                first = self.runs[run.needs]
                if first not in queue and not (self.finished(first) and self.leaves_weights(first)):
                    queue.append(first)
            if run not in queue:
                queue.append(run)
        return queue

    def leaves_weights(self, run: Run) -> bool:
        return (self.work / run.name / "weights.pth").is_file()

    def missing(self, run: Run) -> str:
        """What a run lacks to be run here; empty if nothing."""
        if not (self.configs / f"{run.config}.py").is_file():
            return f"no config {run.config}"
        if run.start is not None and not (ROOT / run.start).is_file():
            return f"no {run.start} (configs/cifar10/README.md says where it comes from)"
        if run.package is not None:
            code = f"import importlib.util as u, sys; sys.exit(u.find_spec({run.package!r}) is None)"
            if subprocess.run([self.python(run), "-c", code], check=False).returncode:
                return f"no package {run.package}"
        return ""

    def python(self, run: Run) -> str:
        return self.python_rivals if run.package else sys.executable

    def command(self, run: Run) -> list[str]:
        words = [word.format(work=self.work, out=self.out) for word in run.args]
        words += ["--seed", str(run.seed), "--work-dir", str(self.work / run.name)]
        # Repeated for its weights alone, a finished run does not touch the figures there are.
        folder, name = (self.work / run.name, "again") if self.finished(run) else (self.out, run.name)
        words += ["--metrics", str(folder / f"{name}.json")]
        if self.data_root:
            words += ["--data-root", self.data_root]
        return [self.python(run), str(ROOT / "benchmarks" / run.script), *words]

    def start(self, run: Run, nice: int) -> Job | None:
        folder = self.work / run.name
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "log.txt").open("a", encoding="utf-8")
        environment = dict(
            os.environ,
            OMP_NUM_THREADS="1",
            MALLOC_MMAP_THRESHOLD_=str(2**32),  # these two save page faults
            MALLOC_TRIM_THRESHOLD_=str(2**32),
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        )
        command = self.command(run)
        if nice:
            command = ["nice", "-n", str(nice), *command]
        # The run holds the lock as long as it lives, also where its driver was killed.
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.close()
                say(f"{run.name}: left out, it is being run by another driver, or by one that was killed")
                return None
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),)
            )
        say(f"{run.name}: started, process {process.pid}, log {folder / 'log.txt'}")
        return Job(run, process, log)

    def work_off(self, chosen: list[Run], jobs: int = 1, nice: int = 0, every: float = 2.0) -> int:
        """Runs what is wanted; returns the number of runs that failed or could not be run."""
        queue, running, failed = self.wanted(chosen), [], set()
        for run in list(queue):
            if why := self.missing(run):
                say(f"{run.name}: left out, {why}")
                queue.remove(run)
                failed.add(run.name)
        try:
            while queue or running:
                busy = {job.run.name for job in running}
                waiting = {run.name for run in queue}
                for run in list(queue):
                    if run.needs in failed:
                        say(f"{run.name}: left out, {run.needs} failed")
                        queue.remove(run)
                        failed.add(run.name)
                    elif len(running) < jobs and run.needs not in busy | waiting:
                        queue.remove(run)
                        if (job := self.start(run, nice)) is None:
                            failed.add(run.name)
                        else:
                            running.append(job)
                time.sleep(every)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    job.log.close()
                    minutes = (time.monotonic() - job.since) / 60
                    if job.process.returncode or not self.finished(job.run):
                        failed.add(job.run.name)
                        say(f"{job.run.name}: FAILED, exit status {job.process.returncode}, after {minutes:.1f} min")
                    else:
                        known = read(self.out, job.run.name)
                        assert known is not None
                        say(f"{job.run.name}: {known[self.figure]:.2f} % after {minutes:.1f} min")
        finally:
            for job in running:
                job.process.terminate()
                job.process.send_signal(signal.SIGCONT)  # a paused run ends, too
            for job in running:
                job.process.wait()
                job.log.close()
                say(f"{job.run.name}: stopped")
        return len(failed)


def say(text: str) -> None:
    print(f"{time.strftime('%m-%d %H:%M:%S')} {text}", flush=True)


def status(sweep: Sweep, chosen: list[Run]) -> None:
    for run in chosen:
        known = read(sweep.out, run.name)
        if known is None:
            text = sweep.missing(run) or "to do"
        elif known["state"] == "finished":
            source = f" (transcribed, commit {known['commit']})" if known.get("transcribed") else ""
            text = f"finished: {known[sweep.figure]:.2f} %, ops {known['ops_kept']:.4f}{source}"
        else:
            last = known["epochs"][-1] if known["epochs"] else {}
            text = f"begun: epoch {last.get('epoch', 0)}, {sweep.figure} {last.get(sweep.figure)}"
        print(f"{run.name:20} {text}")
    strangers = {p.stem for p in sweep.out.glob("*.json")} - {run.name for run in sweep.runs.values()} - {"costs"}
    for name in sorted(strangers):
        print(f"{name:20} NOT DECLARED: no run has this name")


# -- the tables


def cost_key(run: Run) -> str:
    """Name of a run's entry in ``costs.json``: the config, or the run's without its seed where options change it."""
    return run.name.removesuffix(f"_s{run.seed}") if run.altered else run.config


def relative_cost(known: dict[str, Any], costs: dict[str, Any]) -> float | None:
    """Processor time of the run in those of the dense run of its length, from paired steps; None where it was not
    measured."""
    if "relative_cost" in known:
        return known["relative_cost"]
    if known["config"] == DENSE:
        return 1.0
    entry = costs.get(known["config"])
    return None if entry is None else whole_run(entry)


def whole_run(entry: dict[str, Any]) -> float:
    """Processor time of a run over the dense one's: its steps' costs times the epochs that it takes them."""
    return sum(n * step_medians(entry, phase)[0] for phase, n in entry["epochs"].items()) / entry["dense_epochs"]


def step_medians(entry: dict[str, Any], phase: str) -> tuple[float, list[float]]:
    """A step's cost, the median of all measurements' medians, and these, the latest last."""
    each = [m[phase]["median"] for m in (*entry.get("earlier", ()), entry)]
    return statistics.median(each), each


def tables(runs: list[Run], out: Path) -> str:
    """The Markdown tables, by length and target: mean, spread, n, operations, parameters, latency, cost."""
    costs = read(out, "costs") or {}
    finished = {run: known for run in runs if (known := read(out, run.name)) and known["state"] == "finished"}
    lines: list[str] = []
    for start, times, target in sorted({(r.start or "", r.times, -r.target) for r in finished if r.shown}):
        target = -target
        what = "Dense" if target == 1 else f"At most {target:g} of the operations"
        what += (
            f", {times} times as long"
            if times > 1
            else f", from public weights, {TRAINED_EPOCHS} epochs or as much time"
            if start
            else ""
        )
        lines += [
            f"{what}:",
            "",
            "| | n | accuracy, % | standard deviation | by seed | ops | params | ms (over dense) | cost | "
            "processor time, s |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        here = {r: k for r, k in finished.items() if (r.start or "", r.times, r.target) == (start, times, target)}
        rows = dict.fromkeys(run.row for run in runs if run in here and run.shown)
        cells = [
            row_cells(row, {r.seed: k for r, k in here.items() if r.row == row}, costs_of(row, here, costs))
            for row in rows
        ]
        cells.sort(key=lambda cell: -cell[0])
        lines += [text for _, text in cells]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def costs_of(row: str, known: dict[Run, dict[str, Any]], costs: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``costs.json`` that a row's runs go by, by the configs in their metrics files."""
    return {k["config"]: costs[key] for run, k in known.items() if run.row == row and (key := cost_key(run)) in costs}


def row_cells(row: str, by_seed: dict[int, dict[str, Any]], costs: dict[str, Any]) -> tuple[float, str]:
    """The row's mean accuracy, and its text."""
    known = [by_seed[seed] for seed in sorted(by_seed)]
    accuracies = [k["accuracy"] for k in known]
    mean = statistics.mean(accuracies)
    spread = f"{statistics.stdev(accuracies):.2f}" if len(known) > 1 else "-"
    measured = [c for k in known if (c := relative_cost(k, costs)) is not None]
    cost = f"{statistics.mean(measured):.2f}" if len(measured) == len(known) else "-"
    seeds = ", ".join(f"{seed}: {by_seed[seed]['accuracy']:.2f}" for seed in sorted(by_seed))
    named = (
        f"{row} (`{known[0]['config']}`)"
        if not any({"inner_widths", "narrow", "ranking"} & k.keys() for k in known)
        else row
    )
    cells = [
        named,
        str(len(known)),
        f"**{mean:.2f}**",
        spread,
        seeds,
        between([k["ops_kept"] for k in known]),
        between([k["params_kept"] for k in known]),
        milliseconds(known),
        cost,
        " / ".join(seconds(k) for k in known),
    ]
    return mean, f"| {' | '.join(cells)} |"


def between(values: list[float]) -> str:
    low, high = f"{min(values):.4f}".rstrip("0").rstrip("."), f"{max(values):.4f}".rstrip("0").rstrip(".")
    return low if low == high else f"{low} to {high}"


def seconds(known: dict[str, Any]) -> str:
    if "train_seconds" in known:
        return f"{known['train_seconds']:,.0f}"
    return f"{known['seconds_with_validation']:,.0f} (v)"


def with_tables(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """A page's text with other tables between the marks."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"the page must hold {begin} and {end}, each once and in this order")
    return f"{text[: text.index(begin)]}{begin}\n\n{new}\n{text[text.index(end) :]}"


# -- what a step costs


def cost(
    sweep: Sweep, chosen: list[Run], rounds: int, dense: str, size: int = 128, shape: tuple[int, int] = (32, 32)
) -> None:
    """Measures the configs of the chosen runs whose length is fixed in a config, and writes ``costs.json``.

    The slimmed network is the one that the first finished run of the config left, where its work folder is there. What
    was measured before stays beside it under ``earlier``, and all of it counts (:func:`step_medians`). A finished
    run's length came of fewer: ``length_from`` says of how many, from the first.

    Args:
        sweep: where metrics and configs are.
        chosen: the runs.
        rounds: paired steps.
        dense: config of the dense run, without ``.py``.
        size: images a batch.
        shape: (H, W) of the images.
    """
    from measured import origin, write_json
    from whole_run import whole_run_cost

    scripts = ("measured.py", "detector_run.py")  # the others measure their own
    for key, first in {cost_key(r): r for r in reversed(chosen) if r.script in scripts and r.config != dense}.items():
        if not (sweep.configs / f"{first.config}.py").is_file():
            say(f"{first.config}: left out, no such config")
            continue
        finished = [run for run in sweep.runs.values() if cost_key(run) == key and sweep.finished(run)]
        slims = [file for run in finished if (file := sweep.work / run.name / "slim/config.py").is_file()]
        with tempfile.TemporaryDirectory() as folder:
            files = (config_file(sweep, first, Path(folder)), sweep.configs / f"{dense}.py")
            entry = whole_run_cost(*files, rounds, size, shape, left=slims[0] if slims else None)
        about = origin()
        entry.update(machine=about["machine"], commit=about["commit"], torch=about["versions"]["torch"])
        known = read(sweep.out, "costs") or {}
        if (before := known.get(key)) is not None:
            apart = ("epochs", "dense_epochs", "earlier", "length_from")
            alone = {name: value for name, value in before.items() if name not in apart}
            entry["earlier"] = [*before.get("earlier", ()), alone]
            if finished:
                entry["length_from"] = before.get("length_from", len(entry["earlier"]))
        write_json(sweep.out / "costs.json", dict(known, **{key: entry}))
        say(f"{key}: {json.dumps(entry)}")


def config_file(sweep: Sweep, run: Run, folder: Path) -> Path:
    """The config of a run; one that options change is written to ``folder``."""
    if not run.altered:
        return sweep.configs / f"{run.config}.py"
    import measured

    cfg = measured.settled(measured.command_line().parse_args([*run.args, "--work-dir", str(folder)]))
    cfg.dump(path := folder / f"{run.name}.py")
    return path


def latency(sweep: Sweep, chosen: list[Run], rounds: int, dense: str, shape: tuple[int, int]) -> None:
    """Times what the chosen finished runs left for deployment beside the dense network, for their metrics files.

    ``latency``: ``ms`` an image of one thread, ``dense_ms``, and ``ratio``, the quartiles of the paired ratios.

    Args:
        sweep: where metrics, work folders and configs are.
        chosen: the runs.
        rounds: timings of every network.
        dense: config of the dense network, without ``.py``.
        shape: (H, W) of the image.
    """
    import torch
    from measured import write_json

    from mmitp.engine.config import load_config
    from mmitp.engine.example import blank_example
    from mmitp.models.slim_config import is_masked
    from mmitp.pruning.latency import paired_times, processor
    from mmitp.report import read_run
    from mmitp.report.measure import dense_model, deployed_model

    torch.set_num_threads(1)
    models = [dense_model(load_config(str(sweep.configs / f"{dense}.py")))]
    place: dict[Run, int] = {}  # among the models
    for run in filter(sweep.finished, chosen):
        if run.target == 1:
            place[run] = 0
            continue
        cfg = load_config(str(sweep.configs / f"{run.config}.py"))
        try:
            if is_masked(cfg.model):
                left = read_run(sweep.work / run.name)
                if left.slim_config is None:
                    raise ValueError("its masks were not cut out (mmitp slim, into slim/ of its work folder)")
                models.append(deployed_model(left))
            elif run.config == dense:
                raise ValueError("no config builds the network that it leaves")  # another library's
            else:
                models.append(dense_model(cfg))
        except ValueError as error:
            say(f"{run.name}: left out, {error}")
        else:
            place[run] = len(models) - 1
    if not place:
        raise SystemExit("no finished run of these has left its network in --work")
    times = paired_times(models, blank_example(models[0], shape), rounds=rounds) / 1e6
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=times.dtype)
    for run, i in place.items():
        ratio = [round(x, 4) for x in (times[:, i] / times[:, 0]).quantile(quartiles).tolist()]
        entry = dict(
            ms=round(float(times[:, i].quantile(0.5)), 2),
            dense_ms=round(float(times[:, 0].quantile(0.5)), 2),
            ratio=ratio,
            rounds=rounds,
            machine=processor("cpu"),
        )
        write_json(sweep.out / f"{run.name}.json", dict(read(sweep.out, run.name) or {}, latency=entry))
        say(f"{run.name}: {entry['ms']} ms, {ratio[1]} of the dense network's")


def milliseconds(known: list[dict[str, Any]]) -> str:
    """Mean latency of runs, and the ratio to the dense network's; '-' where one was not timed."""
    timed = [k["latency"] for k in known if "latency" in k]
    if len(timed) < len(known):
        return "-"
    ratio = statistics.mean(t["ratio"][1] for t in timed)
    return f"{statistics.mean(t['ms'] for t in timed):.1f} ({ratio:.2f})"


# -- the command line


def command_line(
    doc: str | None, out: Path, work: str, rounds: int, more: tuple[str, ...] = ()
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser that every sweep has, and those of its commands; ``more``: further commands."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    arguments = {name: commands.add_parser(name) for name in ("run", "status", "cost", "latency", "table", *more)}
    for name, command in arguments.items():
        command.add_argument("--out", type=Path, default=out, help="folder of the metrics files")
        if name != "table":
            command.add_argument("--only", nargs="+", metavar="PATTERN", help="names, beginnings of names or globs")
            command.add_argument("--work", type=Path, default=Path(work), help="logs and checkpoints")
    arguments["run"].add_argument("--jobs", type=int, default=1)
    arguments["run"].add_argument("--nice", type=int, default=0)
    arguments["cost"].add_argument("--rounds", type=int, default=rounds)
    arguments["latency"].add_argument("--rounds", type=int, default=100)
    either = arguments["table"].add_mutually_exclusive_group()
    either.add_argument("--write", action="store_true", help="into the README")
    either.add_argument("--check", action="store_true", help="fail if the README says something else")
    return parser, arguments


def put(args: argparse.Namespace, new: str, page: Path, begin: str, end: str) -> None:
    """``table``: prints tables, or writes them into a page, or fails where the page holds others."""
    text = page.read_text(encoding="utf-8")
    if args.write:
        page.write_text(with_tables(text, new, begin, end), encoding="utf-8")
    elif args.check and with_tables(text, new, begin, end) != text:
        raise SystemExit(f"{page} does not hold what the metrics files say: {sys.argv[0]} table --write")
    elif not args.check:
        print(new, end="")


def run_or_tell(args: argparse.Namespace, sweep: Sweep, chosen: list[Run]) -> int:
    """``run`` and ``status``; returns the exit status."""
    if args.command == "status":
        status(sweep, chosen)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through work_off's clean-up
    return 1 if sweep.work_off(chosen, args.jobs, args.nice) else 0


def main() -> None:
    parser, arguments = command_line(__doc__, METRICS, "work_dirs/sweep", rounds=30)
    for name in ("run", "status"):
        arguments[name].add_argument("--data-root", help="folder of cifar-10-batches-py (default: the configs')")
        arguments[name].add_argument("--python-rivals", help="interpreter with torch_pruning and only_train_once")
    args = parser.parse_args()
    runs = declared()
    if args.command == "table":
        put(args, tables(runs, args.out), README, BEGIN, END)
        return
    chosen = selected(runs, args.only)
    if args.command in ("cost", "latency"):
        sweep = Sweep(runs, args.out.resolve(), args.work.resolve())
        if args.command == "cost":
            cost(sweep, chosen, args.rounds, DENSE)
        else:
            latency(sweep, chosen, args.rounds, DENSE, (32, 32))
    else:
        sweep = Sweep(runs, args.out.resolve(), args.work.resolve(), args.data_root, args.python_rivals)
        raise SystemExit(run_or_tell(args, sweep, chosen))


if __name__ == "__main__":
    main()
