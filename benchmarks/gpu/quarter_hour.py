"""All measurements on a card, in their order, within a quarter of an hour: one command, and again to go on.

    python benchmarks/gpu/quarter_hour.py [--minutes 14] [--only cifar_full ...] [--out DIR] [--copy DIR] [--dry-run]

Each script has a share of the time; what one leaves over goes to the next ones. Scripts and parts that are finished are
passed over, so a second quarter of an hour goes on where the first one ended. ``--copy`` is a folder that gets what is
in ``--out``, every few seconds and at the end, for machines that hand back one folder only.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from evidence import GRACE, HERE, stop

#: script -> minutes; the last one takes what is left
SHARES = {"first_contact": 3.0, "step_ratios": 2.0, "cifar_full": 8.0, "kitti_full": 10.0}
COPY_EVERY = 10.0
#: copied: figures, logs of the scripts, and what runs go on from
KINDS = (".json", ".log", ".pth")
#: bytes; a detector's checkpoint with its optimizer is larger, and does not travel
LARGEST = 32 * 2**20


def copy_new(source: Path, target: Path) -> None:
    """Copies files that are new or have changed since; a file that is being written is taken the next time."""
    for file in source.rglob("*"):
        if not file.is_file() or not file.name.endswith(KINDS) or "toy_" in str(file.relative_to(source)):
            continue
        twin = target / file.relative_to(source)
        try:
            if file.stat().st_size > LARGEST:
                continue
            if not twin.exists() or twin.stat().st_mtime < file.stat().st_mtime:
                twin.parent.mkdir(parents=True, exist_ok=True)
                part = twin.with_name(twin.name + ".part")
                shutil.copy2(file, part)
                part.replace(twin)
        except FileNotFoundError:  # replaced meanwhile
            continue


def run(script: Path, options: list[str], seconds: float, out: Path, copy: Path | None) -> int:
    """Runs a script, for so many seconds at most; its exit status."""
    print(f"--- {script.stem}: {seconds / 60:.1f} minutes", flush=True)
    command = [sys.executable, str(script), "--out", str(out), "--minutes", f"{seconds / 60:.4f}", *options]
    process = subprocess.Popen(command, start_new_session=True)
    end, copied = time.monotonic() + seconds + 1.5 * GRACE, time.monotonic()
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
            if copy is not None and time.monotonic() - copied > COPY_EVERY:
                copy_new(out, copy)
                copied = time.monotonic()
    finally:
        stop(process, 2 * GRACE)  # it has a worker of its own to end
        if copy is not None:
            copy_new(out, copy)
    return process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES), metavar="SCRIPT")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/gpu"), help="folder of what is measured")
    parser.add_argument("--copy", type=Path, help="folder that gets it as well")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--together", type=int, default=4, help="cifar_full's")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through run's clean-up
    end, failed = time.monotonic() + 60 * args.minutes, []
    for script in (name for name in SHARES if name in args.only):
        left = end - time.monotonic() - GRACE
        if left < 5:
            failed.append(script)
            print(f"--- {script}: no time left", flush=True)
            continue
        options = ["--dry-run"] if args.dry_run else []
        options += ["--together", str(args.together)] if script == "cifar_full" else []
        seconds = left if script == args.only[-1] else min(60 * SHARES[script], left)
        if run(HERE / f"{script}.py", options, seconds, args.out.resolve(), args.copy):
            failed.append(script)
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)} (NAME.json and NAME.log in {args.out} say why)")


if __name__ == "__main__":
    main()
