"""Whole slimmed networks by the clock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import MacBudget
from ..layers import masked_layers
from ..rng import kept_rng
from ..slim import SlimPlan, slim_with_plan
from ..verify import call_model, eval_mode, frozen_at
from .cost import LatencyCost
from .timing import times_for_a_while


def time_in_turn(
    model: nn.Module, example_inputs: Any, budget: MacBudget, patterns: Sequence[Tensor], rounds: int | None = None
) -> Tensor:
    """Times of slimmed networks, ``(rounds, patterns)`` in ns, on the table's device and with its threads.

    The model stays as it is, and so does the state of random numbers.

    Args:
        model: the masked model the budget was made of.
        example_inputs: of the size and batch the table was measured with, on the model's device.
        budget: a budget with a :class:`LatencyCost`.
        patterns: flat bool patterns.
        rounds: timings of every network; None for as many as take some seconds.
    """
    cost = budget.cost
    assert isinstance(cost, LatencyCost)
    device = torch.device(cost.table.get("device", "cpu"))
    with torch.no_grad(), kept_rng():
        networks = [slimmed_to(model, example_inputs, budget, p)[0].to(device) for p in patterns]
        inputs = _moved(example_inputs, device)
        calls = [lambda m=m: call_model(m, inputs) for m in networks]
        return times_for_a_while(calls, device, cost.table.get("threads"), rounds)


def clock_ratio(model: nn.Module, example_inputs: Any, budget: MacBudget, pattern: Tensor) -> float:
    """Measured latency of the network slimmed to a pattern, as part of the dense one's.

    The median over rounds of the ratio of two times taken one right after the other. On a busy machine, where quiet
    moments are rare, the ratio of the least times scatters several times as much. Arguments: :func:`time_in_turn`.
    """
    dense = torch.ones(budget.n_entries, dtype=torch.bool)
    times = time_in_turn(model, example_inputs, budget, [dense, pattern])
    return float((times[:, 1] / times[:, 0]).quantile(0.5))


def paired_times(
    models: Sequence[nn.Module], example_inputs: Any, threads: int = 1, rounds: int | None = None
) -> Tensor:
    """Times of one evaluation pass of several networks, ``(rounds, models)`` in ns, one after the other in each round.

    With one thread on the CPU it is processor time that counts. Ratios within a round are steadier than the times
    themselves: what else runs on the machine weighs on all of a round alike.

    Args:
        models: networks that take the same input; their mode and the state of random numbers stay.
        example_inputs: as for :class:`MacBudget`.
        threads: of torch.
        rounds: timings of every network; None for as many as take some seconds.
    """
    device = next((p.device for model in models for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), kept_rng(), ExitStack() as modes:
        for model in models:
            modes.enter_context(eval_mode(model))
        calls = [lambda m=m: call_model(m, example_inputs) for m in models]
        return times_for_a_while(calls, device, threads, rounds)


def _moved(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, dict):
        return {key: _moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_moved(value, device) for value in inputs)
    return inputs.to(device) if hasattr(inputs, "to") else inputs


def sample_patterns(budget: MacBudget, count: int) -> list[Tensor]:
    """All on, half on, and patterns whose layers keep different parts."""
    generator = torch.Generator().manual_seed(0)
    rows = budget.tables(torch.device("cpu")).entry_row
    patterns = [torch.ones(budget.n_entries, dtype=torch.bool)]
    for i in range(count - 1):
        low = 0.5 if i == 0 else 0.15 + 0.6 * ((i - 1) % 3) / 2
        keep = low + (0.0 if i == 0 else 0.25) * torch.rand(len(budget.layers), generator=generator)
        patterns.append(budget.binarize(keep[rows] - torch.rand(budget.n_entries, generator=generator)))
    return patterns


def slimmed_to(model: nn.Module, example_inputs: Any, budget: MacBudget, pattern: Tensor) -> tuple[nn.Module, SlimPlan]:
    with frozen_at(budget.patterns(pattern)):
        small, plan = slim_with_plan(model, example_inputs, budget)
    assert not masked_layers(small)
    return small.eval(), plan
