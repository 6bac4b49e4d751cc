"""The main job from nothing: a dense and a pruned CenterNet-DLA34 side by side on generated scenes, to a report.

    python tools/demo.py [--minutes 12] [--work-dir work_dirs/demo]

Generates the scenes, trains configs/demo/centernet_scenes.py and centernet_scenes_prune50.py at the same time (a thread
each), slims the pruned network, tests both clean and under a short attack, times both, exports an ONNX file and writes
the HTML report. How long a training step takes while both run is measured first: as many epochs, images an epoch and
test images are taken as fit into the minutes, on a fast and on a slow or busy machine.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.datasets.scenes import write_scenes
from mmitp.engine.cli import command, non_negative, parser
from mmitp.engine.config import load_config
from mmitp.engine.results import check_writable, provenance, write_results
from mmitp.engine.run import build_runner
from mmitp.report import read_run, write_report
from mmitp.report.measure import sizes_of, time_run

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {name: ROOT / "configs" / "demo" / f"centernet_scenes{end}.py" for name, end in
           (("dense", ""), ("pruned", "_prune50"))}  # fmt: skip
SCENES = dict(frames=560, seed=0, size=[384, 128], val_fraction=0.2)
TRAIN_IMAGES, TEST_IMAGES, BATCH, SHAPE = 448, 112, 8, (128, 384)
EPOCHS = (4, 16)
ATTACK = dict(steps=5, eps=2.0)
DIFFICULTIES = ("easy", "moderate", "hard")
#: of the time: for training; the rest is for tests, timing, export and report
TRAINING = 0.6
#: training images (with repetition) below which the networks find next to no car: 768 gave an AP of 25, 320 gave 0
ENOUGH = 600


class Plan(NamedTuple):
    """What fits into the time: epochs, training images an epoch, test images."""

    epochs: int
    images: int
    test_images: int


class Progress:
    """A line that says what happens and how much of the time is used; on a terminal it stays one line."""

    def __init__(self, minutes: float) -> None:
        self.start, self.minutes, self.shown = time.perf_counter(), minutes, ""

    def used(self) -> float:
        """Minutes since the start."""
        return (time.perf_counter() - self.start) / 60

    def say(self, text: str) -> None:
        """Ends the line that is shown, and shows another."""
        end = "\n" if self.shown and sys.stdout.isatty() else ""
        self.shown = ""
        print(end, end="")
        self.update(text)

    def update(self, text: str) -> None:
        line = f"[{self.used():4.1f} of about {self.minutes:g} min] {text}"
        if sys.stdout.isatty():
            print("\r" + line.ljust(len(self.shown)), end="", flush=True)
        else:
            print(line, flush=True)
        self.shown = line

    def end(self) -> None:
        if self.shown and sys.stdout.isatty():
            print()
        self.shown = ""


def prepare_scenes(folder: Path) -> None:
    """Generates the scenes unless the very same ones are there already."""
    stamp = folder / "scenes.json"
    if (folder / "training" / "image_2").is_dir() and stamp.is_file() and _read(stamp) == SCENES:
        return
    write_scenes(folder, SCENES["frames"], SCENES["seed"], tuple(SCENES["size"]), SCENES["val_fraction"])  # type: ignore[arg-type]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, cut off, or somebody else's
        return None


def data_options(folder: Path) -> list[str]:
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    options = [f"{loader}.dataset.data_root={folder.as_posix()}/" for loader in loaders]
    return options + [f"{part}.data_root={folder.as_posix()}/" for part in ("val_evaluator", "test_evaluator")]


def seconds_a_step(config: str, options: Sequence[str], work_dir: str) -> float:
    """Time of a training step after a warm-up, one thread, loading included."""
    torch.set_num_threads(1)
    cfg = load_config(config, options, work_dir)
    cfg.custom_hooks, cfg.visualizer.vis_backends, cfg.log_level = [], [], "ERROR"
    runner = build_runner(cfg)
    runner.model.train()
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    batches = itertools.chain.from_iterable(itertools.repeat(runner.build_dataloader(cfg.train_dataloader)))
    runner.model.train_step(next(batches), optim_wrapper=wrapper)
    start = time.perf_counter()
    for _ in range(4):
        runner.model.train_step(next(batches), optim_wrapper=wrapper)
    return (time.perf_counter() - start) / 4


def plan(seconds: float, step: float) -> Plan:
    """Fits a run into the seconds that are left; ``step``: of a batch, while both networks train.

    Whole epochs where four of them fit, else four of fewer images. A test image under attack takes as long as
    ``steps + 2`` images of a training step, about.
    """
    steps = max(int(seconds * TRAINING / step), 1)
    whole = TRAIN_IMAGES // BATCH
    epochs = min(max(steps // whole, EPOCHS[0]), EPOCHS[1])
    images = min(max(steps // epochs, 2), whole) * BATCH
    tested = int(seconds * (1 - TRAINING) * 0.4 / (step / BATCH * (ATTACK["steps"] + 2)))
    return Plan(epochs, images, min(max(tested, 8), TEST_IMAGES))


def too_short(it: Plan, step: float) -> str:
    """What to do where a slow or busy machine left too few images to learn from; empty where it did not."""
    seen = it.epochs * it.images
    if seen >= ENOUGH:
        return ""
    steps = math.ceil(ENOUGH / EPOCHS[0] / BATCH) * EPOCHS[0]
    minutes = 3 + math.ceil(steps * step / 60 / TRAINING)  # the scenes and the timing come first
    return (
        f"The networks saw {seen} images each, at {step:.1f} s a step of {BATCH}: too few to find cars, so the AP "
        f"says nothing. On an idle machine, or with 'python tools/demo.py --minutes {minutes}', they see {ENOUGH}."
    )


def schedule(name: str, it: Plan) -> list[str]:
    """Overrides of a config: the plan's length, a short validation, and the pruned network slimmed on the way."""
    options = [
        f"train_cfg.max_epochs={it.epochs}",
        f"train_cfg.val_interval={it.epochs}",
        f"val_dataloader.dataset.indices={BATCH}",
        f"train_dataloader.dataset.indices={it.images}",
        f"param_scheduler.0.end={min(30, it.epochs * it.images // BATCH // 4)}",
        f"param_scheduler.1.end={it.epochs}",
        f"default_hooks.checkpoint.interval={it.epochs}",
        f"default_hooks.logger.interval={max(min(it.images // BATCH // 4, 10), 1)}",
    ]
    if name == "pruned":
        options += [f"custom_hooks.0.end={it.epochs * 6 // 10}", "custom_hooks.0.slim_at_end=True"]
    return options


def start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A tool in a process of its own with one thread, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, env=environment)


def finish(jobs: dict[str, tuple[subprocess.Popen[bytes], Path]], progress: Progress, text: Callable[[], str]) -> None:
    """Waits for processes, and tells every few seconds what ``text()`` says.

    Raises:
        RuntimeError: one of them failed; with the end of what it said.
    """
    told = time.perf_counter()
    pause = 2.0 if sys.stdout.isatty() else 30.0
    while any(job.poll() is None for job, _ in jobs.values()):
        time.sleep(0.2)
        if any(job.poll() for job, _ in jobs.values()):
            break
        if time.perf_counter() - told > pause:
            told = time.perf_counter()
            progress.update(text())
    for name, (job, log) in jobs.items():
        if job.poll():
            for other, _ in jobs.values():
                if other.poll() is None:
                    other.terminate()
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"{name} failed, {log} has all of it:\n" + "\n".join(lines[-5:]))


def state(work_dir: Path) -> str:
    """Where a training is, by the last whole line of its log."""
    logs = sorted(work_dir.glob("*/vis_data/scalars.json"))
    lines = logs[-1].read_text(encoding="utf-8").splitlines() if logs else []
    for line in reversed(lines):
        try:
            now = json.loads(line)
        except ValueError:
            continue
        if "epoch" in now:
            kept = f", {now['ops_kept']:.2f} of the operations (target 0.5)" if "ops_kept" in now else ""
            return f"epoch {now['epoch']}, loss {now['loss']:.2f}{kept}"
    return "starting"


def tool(name: str, *words: str | Path) -> list[str]:
    return [str(ROOT / "tools" / f"{name}.py"), *map(str, words)]


def figures(file: Path) -> dict[str, list[float]]:
    """AP (R40) of cars by difficulty, clean and attacked."""
    report = _read(file)
    return {
        name: [round(float(metrics[f"kitti/Car_R40_{d}"]), 2) for d in DIFFICULTIES]
        for name, metrics in (("car", report["clean"]), ("car_attacked", report["attacked"][0]))
    }


def table(summary: dict[str, Any]) -> list[list[str]]:
    """Dense beside pruned, a row a figure."""
    dense, pruned = summary["dense"], summary["pruned"]
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "Car, AP R40, easy / moderate / hard": lambda s: " / ".join(f"{ap:.2f}" for ap in s["car"]),
        summary["attack"]: lambda s: " / ".join(f"{ap:.2f}" for ap in s["car_attacked"]),
        "MACs": lambda s: f"{s['macs']:,} ({s['macs'] / dense['macs']:.4f})",
        "parameters": lambda s: f"{s['params']:,} ({s['params'] / dense['params']:.4f})",
        "ms an image, one thread": lambda s: f"{s['ms']:.1f}",
        "training, minutes of processor": lambda s: f"{s['train_minutes']:.1f}",
    }
    return [[title, text(dense), text(pruned)] for title, text in shown.items()]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--minutes", type=non_negative, default=12.0, help="time aimed at, all of it (default 12)")
    options.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/demo"), help="an earlier demo's runs in it are replaced"
    )
    options.add_argument("--data", type=Path, default=Path("data/scenes"), help="where the scenes are generated")
    options.add_argument("--step-of", metavar="CONFIG", help="only time a training step of a config (used by the demo)")
    args = options.parse_args(argv)
    work: Path = args.work_dir
    data = data_options(args.data)
    if args.step_of:
        print(f"seconds a step: {seconds_a_step(args.step_of, data, str(work)):.4f}")
        return 0
    out = check_writable(work / "summary.json")
    for name in (*CONFIGS, "report"):
        shutil.rmtree(work / name, ignore_errors=True)
    progress = Progress(args.minutes)

    progress.say(f"1/7 scenes: {SCENES['frames']} frames in {args.data}")
    prepare_scenes(args.data)

    progress.say("2/7 how long a training step takes while both networks train")
    jobs = {}
    for name, config in CONFIGS.items():
        log = work / f"timing_{name}.log"
        words = tool("demo", "--step-of", config, "--data", args.data, "--work-dir", work / f"timing_{name}")
        jobs[name] = (start(words, log), log)
    finish(jobs, progress, lambda: "2/7 timing a training step of both")
    step = max(float(log.read_text().rsplit("seconds a step:", 1)[1].split()[0]) for _, log in jobs.values())
    it = plan((args.minutes - progress.used()) * 60, step)

    progress.say(
        f"3/7 training, {step:.2f} s a step: {it.epochs} epochs of {it.images} images, dense and pruned side by side"
    )
    jobs = {}
    for name, config in CONFIGS.items():
        log = work / f"train_{name}.log"
        words = tool("train", config, "--work-dir", work / name, "--cfg-options", *data, *schedule(name, it))
        jobs[name] = (start(words, log), log)
    finish(jobs, progress, lambda: "3/7 training: " + "; ".join(f"{n}: {state(work / n)}" for n in CONFIGS))

    progress.say("4/7 slimming the pruned network")
    checkpoints = {name: work / name / f"epoch_{it.epochs}.pth" for name in CONFIGS}
    slim = work / "pruned" / "slim"
    log = work / "slim.log"
    # the training's own config has the schedule and the data
    trained = sorted((work / "pruned").glob("*/vis_data/config.py"))[-1]
    finish(
        {"slim": (start(tool("slim", trained, checkpoints["pruned"], "--out", slim), log), log)},
        progress,
        lambda: "4/7 slim",
    )

    attack = ["--attack", "pgd", "--steps", str(ATTACK["steps"]), "--eps", str(ATTACK["eps"])]
    progress.say(f"5/7 testing both on {it.test_images} held-out images, clean and under PGD-{ATTACK['steps']}")
    jobs = {}
    networks = {"dense": (CONFIGS["dense"], checkpoints["dense"]), "pruned": (slim / "config.py", slim / "weights.pth")}
    for name, (config, weights) in networks.items():
        log, json_out = work / f"test_{name}.log", work / name / "test.json"
        words = tool("test", config, weights, *attack, "--max-images", str(it.test_images), "--out", json_out)
        words += ["--work-dir", str(work / f"test_{name}"), "--cfg-options", *data]
        jobs[name] = (start(words, log), log)
    finish(jobs, progress, lambda: "5/7 testing both, clean and under attack")

    onnx, log = work / "pruned" / "slim.onnx", work / "export.log"
    progress.say("6/7 exporting the slimmed network to ONNX, and checking the file")
    export = tool("export", slim / "config.py", slim / "weights.pth", "--out", onnx)
    finish({"export": (start(export, log), log)}, progress, lambda: "6/7 ONNX")

    progress.say("7/7 timing both networks, and the report")
    runs = [read_run(work / name) for name in CONFIGS]
    timing = time_run(runs[1], SHAPE)
    page = write_report(runs, work / "report", title="mmitp demo: dense and pruned", shape=SHAPE, samples=4)[0]
    sizes = sizes_of(runs[1], SHAPE)
    summary: dict[str, Any] = dict(
        epochs=it.epochs,
        images=it.images,
        test_images=it.test_images,
        target=0.5,
        attack=f"the same under PGD-{ATTACK['steps']}, eps {ATTACK['eps']:g}/255",
        minutes=round(progress.used(), 1),
    )
    for run, macs, params, ms in (
        (runs[0], sizes.macs_dense, sizes.params_dense, timing.dense_ms),
        (runs[1], sizes.macs_kept, sizes.params_kept, timing.slimmed_ms),
    ):
        seconds = run.records[-1]["processor_seconds"]
        summary[run.name] = dict(
            **figures(run.folder / "test.json"),
            macs=macs,
            params=params,
            ms=round(float(ms or 0), 2),
            train_minutes=round(seconds / 60, 2),
        )
    summary["table"] = table(summary)
    written = write_results(out, summary, provenance(images=it.test_images, seed=0, device="cpu, a thread a network"))
    progress.end()
    print("\n".join([*written, f"ONNX: {onnx}", f"slimmed network: {slim}", ""]))
    print(aligned([["", "dense", "pruned"], *summary["table"]]))
    print(f"\nreport: {page}")
    if warning := too_short(it, step):
        print(f"\n{warning}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
