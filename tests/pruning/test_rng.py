"""Checks and recordings leave every generator of random numbers as it was."""

from __future__ import annotations

import random
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmitp.pruning import MacBudget, fold_norms, mask_model, randomize_masks, rng, slim
from mmitp.pruning.check import counted_macs
from mmitp.pruning.rng import kept_rng


class Noisy(nn.Module):
    """Draws from every host generator in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.randn_like(x) * random.random() * float(np.random.rand())  # noqa: NPY002
        return self.body(x)


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def seed_all() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


class Device:
    """An accelerator's module with two devices, each with a generator of its own."""

    def __init__(self, initialized: bool = True) -> None:
        self.generators = [torch.Generator().manual_seed(7 + i) for i in range(2)]
        self.initialized = initialized
        self.calls: list[str] = []

    def is_initialized(self) -> bool:
        return self.initialized

    def get_rng_state_all(self) -> list[Tensor]:
        self.calls.append("get")
        return [g.get_state() for g in self.generators]

    def set_rng_state_all(self, states: list[Tensor]) -> None:
        for g, state in zip(self.generators, states, strict=True):
            g.set_state(state)

    def manual_seed_all(self, seed: int) -> None:
        self.calls.append("seed")
        for g in self.generators:
            g.manual_seed(seed)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    fake: Any = SimpleNamespace(**{k: getattr(torch, k) for k in ("get_rng_state", "set_rng_state", "backends")})
    fake.default_generator, fake.cuda, fake.xpu = torch.default_generator, device, None
    monkeypatch.setattr(rng, "torch", fake)
    return device


@pytest.mark.parametrize("seed", [None, 0])
def test_the_sequences_go_on_as_if_nothing_had_been_drawn(seed: int | None, cuda: Device) -> None:
    seed_all()
    expected = draws()
    accelerator = [float(torch.rand((), generator=torch.Generator().manual_seed(7 + i))) for i in range(2)]
    seed_all()
    with suppress(KeyError), kept_rng(seed):
        inside = draws()
        for g in cuda.generators:
            torch.rand(3, generator=g)
        raise KeyError
    assert draws() == expected
    assert [float(torch.rand((), generator=g)) for g in cuda.generators] == accelerator
    assert (inside == expected) == (seed is None)


def test_under_a_seed_all_devices_draw_the_same_every_time(cuda: Device) -> None:
    seen = []
    for _ in range(2):
        draws()
        with kept_rng(3):
            seen.append([*draws(), *(float(torch.rand((), generator=g)) for g in cuda.generators)])
    assert seen[0] == seen[1]


def test_a_device_nobody_uses_is_left_alone(cuda: Device) -> None:
    cuda.initialized = False
    with kept_rng(0):
        pass
    assert cuda.calls == []


def test_no_step_of_the_core_moves_or_seeds_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError("seeds the generators of every device")

    net = mask_model(Noisy().eval())
    x = torch.randn(2, 3, 6, 6)
    seed_all()
    expected = draws()
    randomize_masks(net, 0.5, torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "manual_seed", forbidden)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    for step in (MacBudget, slim, fold_norms, counted_macs):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.default_generator.manual_seed(1)
        step(net, x)
        assert draws() == expected, step.__name__
