"""The pruner in a plain loop on a GPU made of labels, with every cost and push, and what it waits for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_chain import COSTS, chain

from mmitp.pruning import InTrainPruner, MacBudget, freeze_masks, mask_model, masked_layers, randomize_masks
from mmitp.pruning.freeze import project


@pytest.mark.parametrize("cost", ["macs", "latency", "params"])
@pytest.mark.parametrize(("b", "push"), [(10.0, "plain"), (10.0, "balanced"), ("auto", "balanced")])
def test_the_whole_life_of_a_pruner(devices, cost: str, b: Any, push: str) -> None:
    with devices.LogicalGpu() as gpu:
        model = mask_model(chain()).to(gpu.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        example = torch.zeros(1, 3, 12, 12, device=gpu.device)
        pruner = InTrainPruner(model, example, 0.5, b=b, push=push, steps=12, cost=COSTS[cost](), divisor=2)
        pruner.attach(optimizer)
        pruner.active = True
        for step in range(12):
            if step == 6:
                pruner.load_state_dict(pruner.state_dict())
            optimizer.zero_grad()
            model(torch.randn(4, 3, 12, 12, device=gpu.device)).square().mean().backward()
            optimizer.step()
        assert pruner.freeze().ratio <= 0.5
        assert {p.device for p in pruner.slim().parameters()} == {gpu.device}
        pruner.slim(optimizer)
        model(example).sum().backward()
        optimizer.step()
        state = [value for entry in optimizer.state.values() for value in entry.values() if value is not None]
        assert {t.device for t in [*model.parameters(), *state]} == {gpu.device}
    assert not masked_layers(model)
    assert not gpu.mismatches


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_budget_and_projection(devices, granularity: str) -> None:
    with devices.LogicalGpu() as gpu:
        model = mask_model(chain(), granularity).to(gpu.device)
        randomize_masks(model, 0.6)
        budget = MacBudget(model, torch.zeros(1, 3, 12, 12, device=gpu.device))
        budget.hw_loss(0.3).backward()
        assert {layer.prune_mask.grad.device for _, layer in budget.masked} == {gpu.device}
        assert budget.ratio().device == budget.marginal_costs().device == gpu.device
        found = project(budget, 0.4, fill=True, min_keep=0.1)
        freeze_masks(model, budget.split(found.pattern))
        assert budget.kept_macs() <= 0.4 * budget.dense_macs
        budget.table()
        budget.node_needs()
    assert not gpu.mismatches


@pytest.mark.parametrize("cost", ["macs", "latency", "params"])
@pytest.mark.parametrize(("b", "push"), [(10.0, "balanced"), ("auto", "plain")])
def test_the_pruner_waits_for_the_device_fifty_times_in_a_window(devices, cost: str, b: Any, push: str) -> None:
    """And never in between, whatever it decides: here a window of 400 steps, read once in 8, looked at in each."""
    with devices.LogicalGpu() as gpu:
        model = mask_model(chain()).to(gpu.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        example = torch.zeros(1, 3, 12, 12, device=gpu.device)
        pruner = InTrainPruner(model, example, 0.5, b=b, push=push, steps=400, cost=COSTS[cost]())
        pruner.attach(optimizer)
        pruner.active = True
        waits: list[int] = []
        for _ in range(18):
            optimizer.zero_grad()
            model(torch.ones(1, 3, 12, 12, device=gpu.device)).square().mean().backward()
            gpu.syncs.clear()
            optimizer.step()
            waits.append(sum(gpu.syncs.values()))
    # In the first step the budget's tables go to the device.
    assert [step for step, n in enumerate(waits) if n] == [0, 8, 16]
    assert waits[8] == waits[16] == 1


@pytest.mark.parametrize("pruned", [False, True])
def test_the_masked_forward_pass_has_no_graph_break(pruned: bool) -> None:
    model = mask_model(chain())
    x = torch.randn(2, 3, 12, 12)
    if pruned:
        InTrainPruner(model, x[:1], 0.5, b=10.0)
    expected = model(x)
    out = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(layer.prune_mask.grad.any() for layer in masked_layers(model).values())
