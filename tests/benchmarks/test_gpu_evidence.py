"""Parts in workers: what was measured stays, whatever becomes of a part, its worker or the script that started it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parents[2] / "benchmarks/gpu"
SCRIPT = f"""
'''Toy parts.'''
import os, sys, time
sys.path.insert(0, {str(GPU)!r})
import evidence
from evidence import Part, Unfinished

evidence.about = lambda device: dict(card="toy")
evidence.device_of = lambda dry: "cpu"
evidence.release = lambda device: None


def good(bench):
    bench.note(runs=bench.known("runs", 0) + 1)


def fails(bench):
    bench.note(half=1)
    raise ValueError("a bad day")


def dies(bench):
    print("last words", flush=True)
    os._exit(9)


def hangs(bench):
    bench.note(pid=os.getpid())
    time.sleep(60)


def later(bench):
    raise Unfinished("half of it")


PARTS = [Part("fails", fails, 9), Part("dies", dies, 9), Part("hangs", hangs, 1), Part("later", later, 9)]
evidence.main(__doc__, __file__, lambda args: [*PARTS, Part("good", good, 9)], 1.0)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    script = tmp_path / "toy.py"
    script.write_text(SCRIPT)

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, str(script), "--out", str(tmp_path), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return start


def parts(folder: Path) -> dict[str, Any]:
    file = folder / "toy.json"
    return json.loads(file.read_text())["parts"] if file.exists() else {}


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0] == "Z"


def test_a_part_that_fails_dies_or_hangs_costs_no_other_one(start: Any, tmp_path: Path) -> None:
    process = start()
    told = process.communicate(timeout=90)[0]
    assert process.returncode == 1
    known = parts(tmp_path)
    states = {name: part["state"] for name, part in known.items()}
    assert states == dict(fails="failed", dies="failed", hangs="stopped", later="stopped", good="finished")
    assert known["fails"]["half"] == 1
    assert "ValueError: a bad day" in known["fails"]["error"]
    assert "the process ended (9)" in known["dies"]["error"]
    assert "last words" in known["dies"]["error"]
    assert known["hangs"]["error"] == "took longer than its 1 s"
    assert all(part["card"] == "toy" for part in known.values())
    assert "toy good: finished" in told
    assert "toy later: stopped: half of it" in told

    again = start("--parts", "good", "later")
    again.communicate(timeout=90)
    assert parts(tmp_path)["good"]["runs"] == 1  # what is finished is not done again
    anew = start("--parts", "good", "--again")
    anew.communicate(timeout=90)
    assert anew.returncode == 0
    assert parts(tmp_path)["good"]["runs"] == 1
    assert parts(tmp_path)["fails"]["half"] == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_leaves_its_file_and_no_process(start: Any, tmp_path: Path, how: signal.Signals) -> None:
    process = start("--parts", "hangs", "good")
    until(lambda: "pid" in parts(tmp_path).get("hangs", {}))
    pid = parts(tmp_path)["hangs"]["pid"]
    process.send_signal(how)
    process.communicate(timeout=60)
    until(lambda: gone(pid))
    assert parts(tmp_path)["hangs"]["pid"] == pid
    if how == signal.SIGTERM:
        assert process.returncode == 143
        assert parts(tmp_path)["hangs"]["state"] == "stopped"


def test_a_part_that_does_not_exist_is_refused(start: Any) -> None:
    process = start("--parts", "best")
    process.communicate(timeout=60)
    assert process.returncode == 2


# -- the quarter of an hour

FAKE = """
import json, pathlib, sys, time
name = pathlib.Path(__file__).stem
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / f"{name}.json").write_text(json.dumps(sys.argv[1:]))
(out / "large.pth").write_bytes(bytes(2000))
time.sleep(60 if name == "slow" else 0)
"""


def test_every_script_has_its_share_and_what_they_find_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    quarter: Any = importlib.import_module("quarter_hour")
    for name in ("quick", "slow", "last"):
        (tmp_path / f"{name}.py").write_text(FAKE)
    for name, value in dict(
        HERE=tmp_path, GRACE=1.0, LARGEST=1000, SHARES=dict(quick=0.1, slow=0.01, last=1.0)
    ).items():
        monkeypatch.setattr(quarter, name, value)
    out, copy = tmp_path / "out", tmp_path / "copy"
    command = ["quarter_hour.py", "--minutes", "0.6", "--out", str(out), "--copy", str(copy), "--dry-run"]
    monkeypatch.setattr(sys, "argv", [*command, "--only", "quick", "slow", "last"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="not finished: slow "):
            quarter.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    words = json.loads((copy / "last.json").read_text())
    assert "--dry-run" in words
    minutes = float(words[words.index("--minutes") + 1])
    assert 0.3 < minutes < 0.6  # what is left, not its share
    assert sorted(path.name for path in copy.iterdir()) == ["last.json", "quick.json", "slow.json"]
