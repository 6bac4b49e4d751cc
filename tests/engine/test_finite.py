"""What of a network's state says that training has diverged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmitp.engine.finite import diverged

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
)
def test_nan_is_never_right(dtype: torch.dtype) -> None:
    for name in ("net.weight", "attention.hidden"):
        assert diverged(name, torch.tensor([1.0, NAN]).to(dtype))
        assert not diverged(name, torch.tensor([1.0, 2.0]).to(dtype))


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("net.weight", torch.tensor([0.0, -INF]), False),
        ("norm.running_var", torch.tensor([INF]), False),
        ("scale", nn.Parameter(torch.tensor(INF)), False),
        ("attention.hidden", torch.tensor([0.0, -INF]), True),
        ("norm.num_batches_tracked", torch.tensor(3), True),
        ("net.prune_pattern", torch.tensor([True, False]), True),
    ],
)
def test_infinity_is_wrong_where_training_put_it(name: str, value: Tensor, right: bool) -> None:
    assert bool(diverged(name, value)) is not right
