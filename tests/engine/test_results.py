"""Result files: valid JSON, whole or not at all, none lost."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mmitp.engine import results
from mmitp.engine.results import check_writable, plain, provenance, write_results


def read(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_numbers_of_every_library_become_json() -> None:
    lost: dict[str, str] = {}
    value = dict(
        a=torch.tensor(1.5), b=torch.tensor([[1, 2]]), c=np.float32(0.25), d=np.int64(3), e=np.array([True]),
        f=(1, None, "x"), g=Path("p"), h={2: math.nan}, i=[-math.inf, torch.tensor(math.inf)], j=True,
    )  # fmt: skip
    assert plain(value, lost=lost) == dict(
        a=1.5, b=[[1, 2]], c=0.25, d=3, e=[True], f=[1, None, "x"], g="p", h={"2": None}, i=[None, None], j=True
    )  # fmt: skip
    assert lost == {"h.2": "nan", "i[0]": "-inf", "i[1]": "inf"}


def test_what_is_not_finite_is_null_and_said(tmp_path: Path) -> None:
    said = write_results(tmp_path / "a.json", dict(ap=math.nan, ok=1.0), {})
    assert read(tmp_path / "a.json") == dict(ap=None, ok=1.0, run=dict(not_finite=dict(ap="nan")))
    assert said == [f"wrote {tmp_path / 'a.json'}", "not finite, null in the file: ap (nan)"]


def test_a_former_file_moves_aside_and_the_newest_has_the_name(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    for number in range(3):
        said = write_results(path, dict(number=number), {})
    assert [read(path.with_name(name))["number"] for name in ("a.json", "a_2.json", "a_3.json")] == [2, 0, 1]
    assert said[1] == f"the former a.json is now {path.with_name('a_3.json')}"
    assert len(list(path.parent.iterdir())) == 3  # no temporary files


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_results(tmp_path / "a.json", dict(number=number), {}), range(40)))
    assert sorted(read(path)["number"] for path in tmp_path.iterdir()) == list(range(40))


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_write_that_fails_leaves_neither_half_a_file_nor_its_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.json"
    write_results(path, dict(number=1), {})

    def full(*args: object) -> None:
        raise KeyboardInterrupt if step == "link" else OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, step, full)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write_results(path, dict(number=2), {})
    assert [read(file)["number"] for file in tmp_path.iterdir()] == [1]


def test_without_hard_links_the_file_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(results.os, "link", refuse)
    for number in range(2):
        write_results(tmp_path / "a.json", dict(number=number), {})
    assert [read(tmp_path / name)["number"] for name in ("a.json", "a_2.json")] == [1, 0]


def test_where_nothing_can_be_written_is_said_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match=r"results cannot be written to .*file.*a\.json"):
        check_writable(tmp_path / "file" / "a.json")
    check_writable(tmp_path / "deep" / "er" / "a.json")
    assert list((tmp_path / "deep" / "er").iterdir()) == []


def test_a_full_disk_is_found_beforehand_and_named_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def full(handle: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(ValueError, match=r"results cannot be written to .*a\.json: No space left on device$"):
        check_writable(tmp_path / "a.json")
    assert sizes[0] >= 4096
    with pytest.raises(OSError, match=r"No space left on device: .*a\.json"):
        write_results(tmp_path / "a.json", {}, {})
    assert list(tmp_path.iterdir()) == []


def test_files_are_readable_by_others_as_usual(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_results(tmp_path / "a.json", {}, {})
    finally:
        os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_provenance_names_checkpoint_versions_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(sys, "argv", ["test.py", "c.py"])
    run = provenance(config="c.py", checkpoint=weights, seed=0, attack=None)
    versions = run.pop("versions")
    assert run == dict(
        config="c.py", checkpoint=str(weights), seed=0, command=["test.py", "c.py"],
        checkpoint_sha256=hashlib.sha256(b"weights").hexdigest(),
    )  # fmt: skip
    assert versions["torch"] == torch.__version__
    assert {"python", "mmitp", "numpy"} <= versions.keys()
    assert "checkpoint_sha256" not in provenance(checkpoint="https://example.org/w.pth")
