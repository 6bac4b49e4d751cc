"""What counts as PruneHook's part of an iteration, and a rival that would be shown above the target."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmitp.engine.hooks import PruneHook


def test_all_that_the_hook_does_in_an_iteration_is_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the optimizer's step it takes the masks' gradients, after it come Optimizer 2 and the log."""
    step_cost = importlib.import_module("step_cost")
    clock = SimpleNamespace(now=0.0)
    for name, seconds in (("_take_gradients", 1.0), ("_optimizer_2", 2.0), ("after_train_iter", 4.0)):
        spend = lambda *_, seconds=seconds, **__: setattr(clock, "now", clock.now + seconds)  # noqa: E731
        monkeypatch.setattr(PruneHook, name, spend)
    meter = step_cost.Meter(count=False, cpu_time=True)
    monkeypatch.setattr(meter, "clock", lambda: clock.now)
    monkeypatch.setattr(step_cost.MeteredHook, "meter", meter, raising=False)
    hook: Any = step_cost.MeteredHook(0.5)
    hook._take_gradients(None)
    hook._optimizer_2()
    hook.after_train_iter(None, 0)
    assert meter.in_hook == 7.0


def test_a_rival_above_the_target_is_not_timed_as_if_it_met_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inference = importlib.import_module("inference")
    pruner = SimpleNamespace(BasePruner=lambda *_, **__: SimpleNamespace(step=lambda: None))  # prunes nothing
    rival = SimpleNamespace(pruner=pruner, importance=SimpleNamespace(MagnitudeImportance=lambda p: None))
    monkeypatch.setitem(sys.modules, "torch_pruning", rival)
    with torch.no_grad(), pytest.raises(SystemExit, match="do not get there"):
        inference.torch_pruning(nn.Sequential(nn.Conv2d(3, 4, 3)), (16, 16), 0.3, 1)
