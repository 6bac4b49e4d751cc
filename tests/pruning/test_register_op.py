"""Users teach the channel graph functions of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmitp.pruning import MacBudget, mask_model, masked_layers, register_op, slim
from mmitp.pruning.graph import Call, Labels, channelwise, elementwise, ops


@torch.library.custom_op("mmitp_test::swish", mutates_args=())
def swish(x: Tensor, beta: float) -> Tensor:
    return x * torch.sigmoid(beta * x)


@torch.library.custom_op("mmitp_test::blend", mutates_args=())
def blend(x: Tensor, y: Tensor) -> Tensor:
    return 0.25 * x + 0.75 * y


@torch.overrides.wrap_torch_function(lambda x: (x,))
def bias_free_relu(x: Tensor) -> Tensor:
    return F.relu(x) + 0.0


class Net(nn.Module):
    """3 -> 8 -> f -> 4."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.f = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 8, 1), nn.Conv2d(8, 4, 1), f

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(self.stem(x).relu())))


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "HANDLERS", dict(ops.HANDLERS))


def budget_of(f: Any) -> tuple[nn.Module, MacBudget]:
    """Net whose ``b`` drops three of its eight inputs; the example has one position."""
    net = mask_model(Net(f))
    with torch.no_grad():
        masked_layers(net)["b"].prune_mask[:3] = -1
    return net, MacBudget(net, X)


X = torch.randn(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("function", "f", "name"),
    [
        (torch.ops.mmitp_test.swish, lambda x: torch.ops.mmitp_test.swish(x, 1.5), "swish"),
        (bias_free_relu, bias_free_relu, "bias_free_relu"),
        (torch.special.erfcx, torch.special.erfcx, "special_erfcx"),
        ("erfinv", lambda x: x.tanh().erfinv(), "erfinv"),
    ],
)
def test_a_function_is_a_barrier_until_it_is_registered(function: Any, f: Any, name: str) -> None:
    _, budget = budget_of(f)
    assert budget.unfollowed == {"Net": f"{name} is not known to treat channels one by one"}
    assert budget.kept_macs() == 3 * 5 + 5 * 8 + 5 * 4  # a still computes all eight
    register_op(function)
    net, budget = budget_of(f)
    assert budget.unfollowed == {}
    assert budget.kept_macs() == 3 * 5 + 5 * 5 + 5 * 4
    small = slim(net, X, budget)
    assert (small.a.out_channels, small.b.in_channels) == (5, 5)
    torch.testing.assert_close(small(X), net(X))


def test_a_function_of_several_tensors() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.ops.mmitp_test.blend(x.relu(), x.tanh())

    register_op(torch.ops.mmitp_test.blend, elementwise)
    _, budget = budget_of(f)
    assert budget.unfollowed == {}
    assert budget.kept_macs() == 3 * 5 + 5 * 5 + 5 * 4


def test_a_handler_of_ones_own() -> None:
    def reverses_channels(labels: Labels, call: Call) -> None:
        ids = labels.ids(call.inputs[0])
        assert ids is not None
        labels.label(call.outputs[0], ids.flip(1))

    register_op("fliplr", reverses_channels)  # torch.fliplr flips dimension 1
    net, budget = budget_of(torch.fliplr)
    assert budget.unfollowed == {}
    assert budget.kept_macs() == 3 * 5 + 5 * 5 + 5 * 4
    needed = budget.node_needs()[budget.graph.layers[1].out_nodes]
    assert needed.tolist() == [True] * 5 + [False] * 3  # b drops its first three


def test_a_function_that_mixes_channels_is_found_out() -> None:
    register_op("fliplr", channelwise)
    _, budget = budget_of(torch.fliplr)
    assert budget.unfollowed == {"a": "its outputs are read in a way the channel graph did not see"}


def test_the_function_itself_comes_before_its_name() -> None:
    register_op("fliplr", elementwise)
    register_op(torch.fliplr, lambda labels, call: labels.barrier(call.inputs, call.outputs, "looked at"))
    assert budget_of(torch.fliplr)[1].unfollowed == {"Net": "looked at"}


@pytest.mark.parametrize(("function", "handler"), [(3, channelwise), ("", channelwise), ("erfinv", None)])
def test_what_is_no_function_is_refused(function: Any, handler: Any) -> None:
    with pytest.raises(ValueError, match="register_op"):
        register_op(function, handler)
