"""Which mutants of a program there are, and that one is noticed by the test of its line alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = """\
from __future__ import annotations


def clipped(x: int = 3, low: float | None = None) -> int:
    if low is None and not x > 2:
        raise ValueError(f"{x} + 1 is below {2 + 2}")
    return min(x, 10) // 2
"""


@pytest.fixture
def mutation() -> Any:
    import mutation

    return mutation


def test_mutants_are_one_change_each_and_types_and_errors_have_none(mutation: Any) -> None:
    found = [(m.line, m.before, m.after) for m in mutation.mutants("clipped.py", SOURCE)]
    condition = "low is None and (not x > 2)"
    assert found == [
        (4, "3", "4"),
        (5, f"if {condition}:", f"if not ({condition}):"),
        (5, condition, "low is None or not x > 2"),
        (5, "low is None", "low is not None"),
        (5, "not x > 2", "x > 2"),
        (5, "x > 2", "x >= 2"),
        (5, "2", "3"),
        (7, "return min(x, 10) // 2", "return None"),
        (7, "min(x, 10) // 2", "min(x, 10) * 2"),
        (7, "min(x, 10)", "max(x, 10)"),
        (7, "10", "11"),
        (7, "2", "3"),
    ]
    results = []
    for mutant in mutation.mutants("clipped.py", SOURCE):
        program: dict[str, Any] = {}
        exec(mutant.code, program)
        try:
            results.append((program["clipped"](), program["clipped"](30)))
        except ValueError:
            results.append("error")
    assert results == [
        (2, 5), "error", "error", (1, 5), "error", (1, 5), "error", (None, None), (6, 20), (5, 15), (1, 5), (1, 3),
    ]  # fmt: skip


def test_a_mutant_meets_the_quickest_tests_of_its_line(mutation: Any, tmp_path: Path) -> None:
    """A package and its tests in a folder; ``unused`` is run by no test, and ``half`` by one that cannot fail."""
    (tmp_path / "mmitp").mkdir()
    (tmp_path / "mmitp" / "__init__.py").touch()
    code = (
        "def double(x):\n    return x + x\n\n\ndef half(x):\n    return x / 2\n\n\ndef unused(x):\n    return x - 1\n"
    )
    (tmp_path / "mmitp" / "sums.py").write_text(code)
    (tmp_path / "test_sums.py").write_text(
        "from mmitp.sums import double, half\n\n\ndef test_double():\n    assert double(3) == 6\n\n\n"
        "def test_half():\n    half(4)\n"
    )
    (tmp_path / "pyproject.toml").write_text("[tool.coverage.run]\nparallel = true\n")  # as the project's own
    script = (tmp_path / "benchmarks" / "mutation.py").resolve()
    script.parent.mkdir()
    script.write_text(Path(mutation.__file__).read_text(encoding="utf-8"), encoding="utf-8")

    def call(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, str(script), *args], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        )  # fmt: skip
        return done.stdout

    call("lines", "test_sums.py")
    text = call("run", "mmitp/sums.py", "--mutants", "3")
    rows = json.loads((tmp_path / "work_dirs" / "mutation" / "mutants.json").read_text())
    assert len(rows) == 3
    text = call("run", "mmitp/sums.py")
    rows = json.loads((tmp_path / "work_dirs" / "mutation" / "mutants.json").read_text())
    assert {(r["line"], r["after"], r["outcome"]) for r in rows} == {
        (2, "return None", "noticed"), (2, "x - x", "noticed"), (6, "return None", "survived"),
        (6, "x * 2", "survived"), (6, "3", "survived"), (10, "return None", "unreached"),
        (10, "x + 1", "unreached"), (10, "2", "unreached"),
    }  # fmt: skip
    assert text.splitlines()[-1] == "2 noticed, 3 survived, 3 unreached"
    (tmp_path / "test_sums.py").write_text("")
    with pytest.raises(subprocess.CalledProcessError) as error:
        call("run", "mmitp/sums.py", "--out", str(tmp_path / "other.json"))
    assert "run it again" in error.value.stderr
