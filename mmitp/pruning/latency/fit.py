"""What whole networks take beyond their layers, fitted to their times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import MacBudget
from .cost import LatencyCost


def fit_remainder(
    table: dict[str, Any],
    positions: dict[str, int],
    budget: MacBudget,
    model: nn.Module,
    patterns: Sequence[Tensor],
    times: Sequence[float],
    networks: int,
) -> dict[str, Any]:
    """Fits whole networks by scale * layers + elements * (positions times channels) + constant, none negative."""
    tables = budget.tables(torch.device("cpu"))

    def totals(layers: dict[str, Any]) -> Tensor:
        cost = LatencyCost(dict(table, layers=layers), margin=0)
        cost.bind(budget, model)
        return torch.tensor([cost.total(tables, p.double()) for p in patterns], dtype=torch.float64)

    nothing = dict(gather=0.0, scatter=0.0)
    elements = {
        name: dict(e, **nothing, ns=[[0.0] * len(e["outputs"])] * len(e["inputs"]), element=float(positions[name]))
        for name, e in table["layers"].items()
    }
    measured = torch.tensor(times, dtype=torch.float64)
    features = torch.stack([totals(table["layers"]), totals(elements), torch.ones(len(times))], 1).double()
    # Relative errors; the dense network, of which a target is a fraction, counts as much as all others.
    weight = torch.ones(networks, dtype=torch.float64)
    weight[0] = (networks - 1) ** 0.5
    rows = features[:networks] / measured[:networks, None] * weight[:, None]
    scale, element, constant = _nonnegative(rows, weight).tolist()
    for name, entry in table["layers"].items():
        entry["ns"] = [[scale * v for v in line] for line in entry["ns"]]
        entry["gather"], entry["scatter"] = scale * entry["gather"], scale * entry["scatter"]
        entry["element"] = element * positions[name]
    table["constant"] = constant
    predicted = features @ torch.tensor([scale, element, constant], dtype=torch.float64)
    table["fit"] = dict(scale=scale, element=element, constant=constant)
    table["networks"] = [
        dict(ratio=budget.macs_of(p) / budget.dense_macs, measured=t, predicted=float(q), fitted=i < networks)
        for i, (p, t, q) in enumerate(zip(patterns, times, predicted, strict=True))
    ]
    return table


def _nonnegative(a: Tensor, b: Tensor) -> Tensor:
    """Least squares with no negative unknown, by trying every set of unknowns (there are few)."""
    best, error = torch.zeros(a.shape[1], dtype=a.dtype), float(b.square().sum())
    for size in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), size):
            x = torch.linalg.lstsq(a[:, chosen], b[:, None], driver="gelsd").solution[:, 0]
            left = float((a[:, chosen] @ x - b).square().sum())
            if bool((x >= 0).all()) and left < error:
                best, error = torch.zeros_like(best), left
                best[list(chosen)] = x
    return best
