"""Three convolutions, and every cost that a budget of theirs may count."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmitp.pruning.latency import TABLE_FORMAT, LatencyCost


def chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))


def latency() -> LatencyCost:
    """Proportional to the product of the channels, 100 ns for each pair."""

    def entry(n_in: int, n_out: int, side: int) -> dict[str, Any]:
        ns = [[100.0 * i * o for o in (1, n_out)] for i in (1, n_in)]
        sizes = dict(n_in=n_in, n_out=n_out, pair_macs=9 * side**2, inputs=[1, n_in], outputs=[1, n_out])
        return dict(**sizes, ns=ns, gather=1.0, scatter=1.0, element=1.0)

    layers = {"0": entry(3, 8, 10), "3": entry(8, 8, 8), "4": entry(8, 4, 6)}
    return LatencyCost(dict(format=TABLE_FORMAT, shape=[12, 12], layers=layers, constant=100.0), margin=0.1)


COSTS = {"macs": lambda: "macs", "params": lambda: "params", "latency": latency}
