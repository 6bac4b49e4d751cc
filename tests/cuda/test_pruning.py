"""Budget, pruner, freeze and slimming on the device against the CPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from twins import compare

from mmitp.pruning import InTrainPruner, MacBudget, mask_model, project, randomize_masks


def net() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 8, 3)]
    return mask_model(nn.Sequential(*layers))


def test_the_budget_is_the_same_integer_and_so_is_what_the_freeze_keeps(device: torch.device) -> None:
    model = net()
    randomize_masks(model, 0.6, torch.Generator().manual_seed(0))
    there = copy.deepcopy(model).to(device)
    x = torch.zeros(1, 3, 12, 12)
    here, far = MacBudget(model, x), MacBudget(there, x.to(device))
    assert (here.dense_macs, here.kept_macs()) == (far.dense_macs, far.kept_macs())
    assert here.ratio().item() == far.ratio().item()
    compare({"push": here.marginal_costs()}, {"push": far.marginal_costs()})
    for divisor in (1, 8):
        patterns = [project(budget, 0.4, fill=True, divisor=divisor).pattern.cpu() for budget in (here, far)]
        assert torch.equal(*patterns)


@pytest.mark.parametrize("b", [10.0, "auto"])
def test_a_pruned_training_takes_the_same_steps(device: torch.device, b: Any) -> None:
    """Losses and masks agree step for step, and the small network trains on."""
    first, ends = net(), []
    for place in (torch.device("cpu"), device):
        model = copy.deepcopy(first).to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        pruner = InTrainPruner(model, torch.zeros(1, 3, 12, 12, device=place), 0.5, b=b, lr=0.5, steps=12)
        pruner.attach(optimizer)
        pruner.active = True
        generator, losses = torch.Generator().manual_seed(0), []
        for step in range(16):
            if step == 12:
                report = pruner.freeze()
                masks = torch.cat([layer.prune_mask.detach().cpu() for layer in pruner.masks.values()])
                pruner.slim(optimizer)
            optimizer.zero_grad()
            x = torch.randn(4, 3, 12, 12, generator=generator).to(place)
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().cpu())
            del loss
        ends.append(dict(losses=torch.stack(losses), masks=masks, ratio=torch.tensor(report.ratio)))
    compare(*ends)
