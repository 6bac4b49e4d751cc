"""Measurements in parts: what was measured is in a file at once, and a part that fails or hangs costs no other one.

A script declares its parts and calls :func:`main`. The parts run one after the other in a worker process. A worker that
dies, or whose part takes longer than its limit, is replaced by a new one for the parts that are left (an error on the
device spoils every later call of its process). ``OUT/NAME.json`` has a dict for each part, written whenever
something is known: its ``state`` (``running``, ``finished``, ``failed``, ``stopped``), commit and card, and what it
measured. The same command given again goes through the parts that are not finished; ``NAME.log`` has all output.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the scripts of benchmarks/ are imported by their plain names

from records import write_json  # noqa: E402

#: A dry run's limits are so many times longer: a CPU may be a busy one.
SLOWER = 20
#: Seconds between being asked to stop and being killed.
GRACE = 10.0


class Evidence:
    """A file of parts.

    Args:
        path: ``OUT/NAME.json``; what it holds is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.parts: dict[str, dict[str, Any]] = known.get("parts", {})

    def note(self, part: str, **figures: Any) -> None:
        """Adds to a part, on file when this returns."""
        self.parts.setdefault(part, {}).update(figures)
        self.save()

    def forget(self, part: str) -> None:
        """Drops a part."""
        self.parts.pop(part, None)
        self.save()

    def save(self) -> None:
        write_json(self.path, dict(parts=self.parts))

    def state(self, part: str) -> str | None:
        return self.parts.get(part, {}).get("state")


@dataclass
class Bench:
    """What a part is given.

    Attributes:
        name: of the part.
        evidence: where it is written down.
        device: ``'cuda'``, or ``'cpu'`` in a dry run.
        dry: toy sizes, to see that everything runs.
        out: the folder; a part may keep files of its own there.
        deadline: by :func:`time.monotonic`, when the part will be stopped.
    """

    name: str
    evidence: Evidence
    device: str
    dry: bool
    out: Path
    deadline: float

    def note(self, **figures: Any) -> None:
        """Writes figures down."""
        self.evidence.note(self.name, **figures)

    def known(self, key: str, default: Any = None) -> Any:
        """A figure that is there already, of this run or of one before it."""
        return self.evidence.parts.get(self.name, {}).get(key, default)

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Part:
    """A part of a script.

    Attributes:
        name: its key in the file.
        run: does it; an exception is a failure that the file tells.
        limit: seconds.
    """

    name: str
    run: Callable[[Bench], None]
    limit: float


class Unfinished(Exception):
    """A part that was asked to stop and goes on where it was when the same command is given again."""


def main(
    doc: str | None,
    script: str,
    parts: Callable[[argparse.Namespace], Sequence[Part]],
    minutes: float,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """The command line of a script of parts.

    Args:
        doc: the script's description.
        script: its ``__file__``.
        parts: of the arguments, in the order of their worth.
        minutes: default of ``--minutes``.
        options: adds the script's own to the parser.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/gpu"), help="folder of what is measured")
    parser.add_argument("--minutes", type=float, default=minutes, help="stop after so long (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU where there is no GPU")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--again", action="store_true", help="also the parts that are finished")
    parser.add_argument("--seconds", type=float, default=1e9, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options(parser)
    args = parser.parse_args()
    args.out = args.out.resolve() / ("dry" if args.dry_run else "")  # what is finished there is not finished here
    all_parts = [replace(p, limit=p.limit * (SLOWER if args.dry_run else 1)) for p in parts(args)]
    known = [p.name for p in all_parts]
    if unknown := set(args.parts or ()) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    stem = args.out / Path(script).stem
    if args.worker:
        watch_parent()
        chosen = [p for p in all_parts if p.name in args.worker]
        work(chosen, stem.with_suffix(".json"), device_of(args.dry_run), args.dry_run, args.seconds)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through drive's clean-up
    chosen = [p for p in all_parts if not args.parts or p.name in args.parts]
    left = drive([sys.executable, script, *sys.argv[1:]], chosen, stem, args.minutes * 60, args.again)
    raise SystemExit(1 if left else 0)


def device_of(dry: bool) -> str:
    """``'cuda'``; without one, ``'cpu'`` in a dry run."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if not dry:
        raise SystemExit("no CUDA device: --dry-run goes through everything at toy sizes on the CPU")
    torch.set_num_threads(1)
    return "cpu"


def drive(command: Sequence[str], parts: Sequence[Part], stem: Path, seconds: float, again: bool = False) -> list[str]:
    """Runs parts in workers until all are done or the time is over; returns the names of those that did not finish.

    Args:
        command: starts a worker, once ``--worker`` and names of parts are added.
        parts: in order.
        stem: of the files, ``stem.json`` and ``stem.log``.
        seconds: for all of them.
        again: also those that are finished.
    """
    end = time.monotonic() + seconds
    path, log = stem.with_suffix(".json"), stem.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    evidence = Evidence(path)
    if again:
        for part in parts:
            evidence.forget(part.name)
    left = [p for p in parts if evidence.state(p.name) != "finished"]
    for part in left:
        if part.name in evidence.parts:  # the state that an earlier run left says nothing of this one
            evidence.note(part.name, state="waiting")
    failed: list[str] = []
    while left and time.monotonic() < end:
        with log.open("a", encoding="utf-8") as file:
            begin = file.tell()
            worker = subprocess.Popen(
                [*command, "--seconds", str(end - time.monotonic()), "--worker", *(p.name for p in left)],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        why: str | None = "stopped"
        try:
            why = _watch(worker, left, path, end)
        finally:
            stop(worker)
            output = log.read_bytes()[begin:].decode(errors="replace")[-2000:]
            over = _settle(Evidence(path), left, why, f"({worker.returncode}): {output}")
        tell(stem, [p.name for p in over])
        failed += [p.name for p in over if Evidence(path).state(p.name) != "finished"]
        if not over and why is None:
            print(f"{stem.name}: the worker did not start {output.strip()}", flush=True)
            break
        left = [p for p in left if p not in over]
    else:
        for part in left:
            print(f"{stem.name} {part.name}: no time left", flush=True)
    return failed + [p.name for p in left]


def _settle(evidence: Evidence, parts: Sequence[Part], why: str | None, end: str) -> list[Part]:
    """Writes down what became of a part that was running when its worker ended; returns those that are over."""
    over = []
    for part in parts:
        state = evidence.state(part.name)
        if state == "running" and why is None:
            evidence.note(part.name, state="failed", error=f"the process ended {end}")
        elif state == "running":
            evidence.note(part.name, state="stopped", error=why)
        if state in ("running", "finished", "failed", "stopped"):
            over.append(part)
    return over


def tell(stem: Path, names: Sequence[str]) -> None:
    """Prints a line for each of some parts."""
    parts = Evidence(stem.with_suffix(".json")).parts
    for name in names:
        error = parts[name].get("error", "").strip().splitlines()[-1:]
        print(f"{stem.name} {name}: {': '.join([parts[name]['state'], *error])}", flush=True)


def _watch(worker: subprocess.Popen, parts: Sequence[Part], path: Path, end: float) -> str | None:
    """Waits for a worker; why it has to be stopped, or None if it ended by itself."""
    limits = {p.name: p.limit for p in parts}
    current, since = None, time.monotonic()
    while worker.poll() is None:
        time.sleep(0.1)
        evidence = Evidence(path)
        running = next((name for name in limits if evidence.state(name) == "running"), None)
        if running != current:
            current, since = running, time.monotonic()
        if time.monotonic() > end:
            return "out of time"
        if current is not None and time.monotonic() - since > limits[current]:
            return f"took longer than its {limits[current]:g} s"
    return None


def stop(process: subprocess.Popen, grace: float = GRACE) -> None:
    """Ends a process that leads a group: asked first, then killed, its children with it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # children that are left
    except ProcessLookupError:
        pass
    process.wait()


def watch_parent() -> None:
    """Ends this process and its group when the one that started it is gone, so that no orphan holds the device."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGTERM)
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def work(parts: Sequence[Part], path: Path, device: str, dry: bool, seconds: float | None = None) -> None:
    """A worker's life: one part after the other, each written down before it begins."""
    end = time.monotonic() + (seconds or 1e9)
    evidence, origin = Evidence(path), about(device)
    for part in parts:
        former = {k: v for k, v in evidence.parts.get(part.name, {}).items() if k not in ("error", "seconds")}
        evidence.parts[part.name] = former
        evidence.note(part.name, state="running", dry=dry, **origin)
        start = time.monotonic()
        bench = Bench(part.name, evidence, device, dry, path.parent, min(end, start + part.limit))
        print(f"--- {part.name}", flush=True)
        try:
            part.run(bench)
        except Unfinished as left:
            bench.note(state="stopped", error=str(left), seconds=round(time.monotonic() - start, 1))
        except Exception as error:
            told = traceback.format_exc()
            print(told, flush=True)
            bench.note(state="failed", error=told[-3000:], seconds=round(time.monotonic() - start, 1))
            if device == "cuda" and "CUDA" in str(error) and "out of memory" not in str(error):
                raise SystemExit(1) from None  # nothing works any more in a process after such an error
        else:
            bench.note(state="finished", seconds=round(time.monotonic() - start, 1))
        release(device)


def release(device: str) -> None:
    """Gives back what a part left behind on the device."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def about(device: str) -> dict[str, Any]:
    """Commit, versions and card. Where the tree came without git's folder, ``MMITP_COMMIT`` says which it is."""
    import torch
    from measured import origin

    known = {key: value for key, value in origin().items() if key != "command"}
    known["commit"] = known["commit"] or os.environ.get("MMITP_COMMIT", "unknown")
    if device != "cuda":
        return dict(known, card=None)
    card = torch.cuda.get_device_properties(0)
    return dict(
        known,
        card=f"{card.name}, {card.total_memory / 2**30:.0f} GiB",
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        driver=_driver(),
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except OSError:
        return ""


def peak_memory(device: str) -> float | None:
    """GiB that torch has held at most since the part began."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 3) if device == "cuda" else None


def synchronize(device: str) -> None:
    """Waits for the device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
