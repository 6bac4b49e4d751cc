"""Attacks on the device against the CPU, from the same random starts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmitp.attacks import cross_entropy, fgsm_rs, grad_align, n_fgsm, pgd

ATTACKS = {
    "fgsm_rs": lambda loss, x, g: fgsm_rs(loss, x, eps=0.1, alpha=0.125, generator=g),
    "n_fgsm": lambda loss, x, g: n_fgsm(loss, x, eps=0.1, generator=g),
    "pgd": lambda loss, x, g: pgd(loss, x, eps=0.1, alpha=0.025, steps=5, restarts=2, generator=g),
    "pgd-l2": lambda loss, x, g: pgd(loss, x, eps=1.0, alpha=0.25, steps=5, norm="l2", generator=g),
}


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attack_finds_the_same_images(device: torch.device, name: str) -> None:
    """All but a few values: the sign of a gradient next to zero is anybody's."""
    model, x = net(), torch.rand(6, 3, 10, 10)
    labels = torch.arange(6) % 5
    found = []
    for place in ("cpu", device):
        twin = copy.deepcopy(model).to(place)
        loss = cross_entropy(twin, labels.to(place))
        generator = torch.Generator().manual_seed(0)  # the CPU's: it serves both
        adversarial = ATTACKS[name](loss, x.to(place), generator)
        assert adversarial.device.type == torch.device(place).type
        assert all(p.grad is None for p in twin.parameters())
        assert (loss(adversarial) > loss(x.to(place))).float().mean() > 0.8
        found.append(adversarial.cpu())
    assert ((found[0] - found[1]).abs() < 1e-4).float().mean() > 0.99
    assert found[1].min() >= 0
    assert found[1].max() <= 1


def test_the_devices_own_generator_repeats_itself(device: torch.device) -> None:
    model, x = net().to(device), torch.rand(6, 3, 10, 10, device=device)
    loss = cross_entropy(model, torch.arange(6, device=device) % 5)
    ends = [ATTACKS["fgsm_rs"](loss, x, torch.Generator(device).manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_grad_align(device: torch.device) -> None:
    model, x, values = net(), torch.rand(6, 3, 10, 10), []
    for place in ("cpu", device):
        twin = copy.deepcopy(model).to(place)
        loss = cross_entropy(twin, torch.arange(6).to(place) % 5)
        value = grad_align(loss, x.to(place), eps=0.1, generator=torch.Generator().manual_seed(0))
        value.backward()
        values.append((value.item(), twin[0].weight.grad.cpu()))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-3, abs=1e-6)
    assert torch.allclose(values[0][1], values[1][1], rtol=1e-2, atol=1e-5)
