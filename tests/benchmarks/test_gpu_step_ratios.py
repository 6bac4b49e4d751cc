"""Steps in turns on the CPU at toy size: every ratio is there, once, and what cannot be measured is named."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")


def work(folder: Path, part: str) -> dict[str, Any]:
    evidence: Any = importlib.import_module("evidence")
    script: Any = importlib.import_module("step_ratios")
    evidence.work([p for p in script.PARTS if p.name == part], folder / "step_ratios.json", "cpu", dry=True)
    known = json.loads((folder / "step_ratios.json").read_text())["parts"][part]
    assert known["state"] == "finished", known.get("error")
    return known


def test_a_network_is_measured_in_training_and_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: Any = importlib.import_module("mmitp.engine.hooks")
    perturb, moved = hooks.AdversarialHook.perturb, []

    def watched(self: Any, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        attacked = perturb(self, model, batch)
        moved.append(not bool((attacked["inputs"] == batch["inputs"]).all()))
        return attacked

    monkeypatch.setattr(hooks.AdversarialHook, "perturb", watched)
    known = work(tmp_path, "resnet20")
    assert len(moved) >= 3  # dense, masked and slimmed
    assert all(moved)
    training = known["training"]
    assert set(training) == {f"{n}{a}" for n in ("dense", "masked", "slimmed") for a in ("", " attacked")}
    assert training["dense"]["median"] == training["dense attacked"]["median"] == 1
    assert training["slimmed attacked"]["over"] == "dense attacked"
    assert set(known["training, captured"]) == set(training)
    for batch in (1, 2):
        for how in ("", ", captured"):
            assert {"dense", "slimmed"} <= set(known[f"inference, batch {batch}{how}"])
    assert 0.4 < known["kept"]["slimmed"] <= 0.5
    assert "torch_pruning" in {*known["kept"], *known["left_out"]}


def test_an_attacked_step_is_compared_with_the_plain_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    script: Any = importlib.import_module("step_ratios")
    now = 0.0

    def step(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(script.time, "perf_counter", lambda: now)
    seconds = {"dense": 1.0, "dense attacked": 2.5, "slimmed": 0.5, "slimmed attacked": 1.0}
    steps = {name: partial(step, long) for name, long in seconds.items()}
    noted: dict[str, Any] = {}
    bench = SimpleNamespace(dry=True, device="cpu", known=lambda key: None, note=noted.update)
    script.take_turns(bench, "training", steps, 0.0)
    figures = noted["training"]
    assert {name: figures[name]["median"] for name in steps} == {
        "dense": 1,
        "dense attacked": 1,
        "slimmed": 0.5,
        "slimmed attacked": 0.4,
    }
    assert figures["dense attacked"]["over_plain"] == 2.5
    assert figures["slimmed attacked"]["over_plain"] == 2


def test_a_second_call_keeps_what_was_measured(tmp_path: Path) -> None:
    evidence: Any = importlib.import_module("evidence")
    script: Any = importlib.import_module("step_ratios")
    bench = evidence.Bench("net", evidence.Evidence(tmp_path / "x.json"), "cpu", True, tmp_path, 1e12)
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("dense", "masked")}
    script.take_turns(bench, "training", steps, 0.0)
    assert calls == ["dense", "masked"] + ["dense", "masked", "masked", "dense", "dense", "masked"]
    script.take_turns(bench, "training", steps, 0.0)
    assert len(calls) == 8


def test_a_step_that_cannot_be_captured_is_named(tmp_path: Path) -> None:
    evidence: Any = importlib.import_module("evidence")
    script: Any = importlib.import_module("step_ratios")
    bench = evidence.Bench("net", evidence.Evidence(tmp_path / "x.json"), "cpu", True, tmp_path, 1e12)

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    errors: dict[str, str] = {}
    assert list(script.graphed(bench, {"dense": lambda: None, "masked": waits}, errors)) == ["dense"]
    assert errors == {"masked": "RuntimeError: operation not permitted when stream is capturing"}
