"""Products count by what they are, whatever they are spelt like, and what feeds them stays whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmitp.pruning import MacBudget, mask_model, slim
from mmitp.pruning.check import check_slimming, counted_macs

#: 2 convolutions at 4x4: 3 -> 6 and 6 -> 8
CONVS = 16 * (3 * 6 + 6 * 8)


class Net(nn.Module):
    """Two convolutions, and a function of their 8 channels with a weight (8, 5) and another (5, 8, 8)."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.w, self.cube = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5, 8, 8))
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, self.b(F.relu(self.a(x))))


def tokens(y: Tensor) -> Tensor:
    """(N, 16, 8)"""
    return y.flatten(2).transpose(1, 2)


def row(y: Tensor) -> Tensor:
    """(8,)"""
    return y[0, :, 0, 0]


class LowRank(torch.autograd.Function):
    """Custom code that torch's Python level does not show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


@torch.jit.script
def scripted(x: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(x, w)


#: what is done with the (2, 8, 4, 4) map, and its MACs by hand: 2 images of 16 places, 8 channels in, 5 out
FULL = 2 * 16 * 8 * 5
SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "linear": (lambda m, y: F.linear(tokens(y), m.w.t()), FULL),
    "conv2d": (lambda m, y: F.conv2d(y, m.w.t()[:, :, None, None]), FULL),
    "conv1d": (lambda m, y: F.conv1d(y.flatten(2), m.w.t()[:, :, None]), FULL),
    "conv_transpose2d": (lambda m, y: F.conv_transpose2d(y, m.w[:, :, None, None].expand(-1, -1, 2, 2)), 4 * FULL),
    "at": (lambda m, y: tokens(y) @ m.w, FULL),
    "weight_first": (lambda m, y: m.w.t() @ y.flatten(2), FULL),
    "matmul": (lambda m, y: torch.matmul(tokens(y), m.w), FULL),
    "mm": (lambda m, y: torch.mm(tokens(y)[0], m.w), FULL // 2),
    "addmm": (lambda m, y: torch.addmm(torch.zeros(5), tokens(y)[1], m.w), FULL // 2),
    "bmm": (lambda m, y: torch.bmm(tokens(y), m.w.expand(2, -1, -1)), FULL),
    "baddbmm": (lambda m, y: torch.baddbmm(torch.zeros(1), tokens(y), m.w.expand(2, -1, -1)), FULL),
    "addbmm": (lambda m, y: torch.addbmm(torch.zeros(1), tokens(y), m.w.expand(2, -1, -1)), FULL),
    "mv": (lambda m, y: torch.mv(m.w.t(), row(y)), 8 * 5),
    "addmv": (lambda m, y: torch.addmv(torch.zeros(5), m.w.t(), row(y)), 8 * 5),
    "dot": (lambda m, y: torch.dot(row(y), m.w[:, 0]), 8),
    "einsum": (lambda m, y: torch.einsum("nchw,ck->nkhw", y, m.w), FULL),
    "tensordot": (lambda m, y: torch.tensordot(y, m.w, dims=([1], [0])), FULL),
    "inner": (lambda m, y: torch.inner(tokens(y), m.w.t()), FULL),
    "bilinear": (lambda m, y: F.bilinear(tokens(y), tokens(y), m.cube), 2 * 16 * 5 * 8 * 8),
    "transposed_and_scaled": (lambda m, y: tokens(y) @ (0.5 * m.w.t().contiguous().t()), FULL),
    "half_precision": (lambda m, y: tokens(y).bfloat16() @ m.w.bfloat16(), FULL),
    # the weight itself is a product of two: 5 x 8 by 8 x 8
    "low_rank": (lambda m, y: F.linear(tokens(y), m.w.t() @ m.cube[0]), FULL + 5 * 8 * 8),
    "queries_attend": (
        lambda m, y: F.scaled_dot_product_attention(m.cube[:1].expand(2, -1, -1), tokens(y), tokens(y)),
        2 * 8 * 16 * 8,  # the learned queries by the keys; the weights by the values are two activations
    ),
    "hidden": (lambda m, y: LowRank.apply(tokens(y), m.w), FULL),
    "scripted": (lambda m, y: scripted(tokens(y), m.w), FULL),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_product_with_a_weight_counts_and_keeps_what_feeds_it(name: str) -> None:
    run, macs = SPELLINGS[name]
    net, x = mask_model(Net(run).eval()), torch.randn(2, 3, 4, 4)
    budget = MacBudget(net, x)
    assert budget.dense_macs == counted_macs(net, x) == 2 * CONVS + macs
    assert [why for why in budget.unfollowed.values() if why.endswith("counted, stays dense")]
    with torch.no_grad():
        net.b.prune_mask[1:4] = -1
    rows = {r.name: r for r in budget.table()}
    assert rows["b"].out_kept == 8
    assert budget.kept_macs() == 2 * CONVS + macs - 2 * 16 * 3 * (3 + 8) == counted_macs(slim(net, x, budget), x)


RECURRENT = {
    "lstm": (nn.LSTM(8, 7, batch_first=True), 4 * 7 * (8 + 7)),
    "gru": (nn.GRU(8, 7, batch_first=True), 3 * 7 * (8 + 7)),
    "rnn": (nn.RNN(8, 7, batch_first=True), 7 * (8 + 7)),
    "two_directions": (nn.LSTM(8, 7, batch_first=True, bidirectional=True), 2 * 4 * 7 * (8 + 7)),
    "two_layers": (nn.GRU(8, 7, 2, batch_first=True), 3 * 7 * (8 + 7) + 3 * 7 * (7 + 7)),
    "projected": (nn.LSTM(8, 7, batch_first=True, proj_size=2), 4 * 7 * (8 + 2) + 7 * 2),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_count_each_step(name: str) -> None:
    layer, each = RECURRENT[name]
    net, x = mask_model(Net(lambda m, y: m.r(tokens(y))[0], r=layer)), torch.randn(2, 3, 4, 4)
    budget = MacBudget(net, x)
    assert budget.dense_macs == counted_macs(net, x) == 2 * CONVS + 2 * 16 * each
    assert {r.name: r.out_kept for r in budget.table()}["b"] == 8
    assert check_slimming(net, x, target=0.95).passed


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells_count_each_call(cell: Callable[..., nn.Module], gates: int) -> None:
    def run(m: Any, y: Tensor) -> Any:
        state = None
        for t in tokens(y).unbind(1):
            state = m.r(t, state)
        return state

    net, x = mask_model(Net(run, r=cell(8, 7))), torch.randn(2, 3, 4, 4)
    budget = MacBudget(net, x)
    assert budget.dense_macs == counted_macs(net, x) == 2 * CONVS + 2 * 16 * gates * 7 * (8 + 7)
    assert sum(name.startswith("r.") for name in budget.unfollowed) == 1  # one line, not one a step


def test_products_of_two_activations_are_left_out_even_through_views_and_buffers() -> None:
    def run(m: Any, y: Tensor) -> Tensor:
        t, buffer = tokens(y), torch.zeros(2, 8, 16)
        buffer[:, :4] = y.flatten(2)[:, :4]
        return t @ t.transpose(1, 2) + t @ buffer + F.linear(t[0], t[0]) + torch.einsum("nkc,nqc->nkq", t, t)

    net, x = mask_model(Net(run)), torch.randn(2, 3, 4, 4)
    assert MacBudget(net, x).dense_macs == counted_macs(net, x) == 2 * CONVS


def test_a_convolution_counts_whatever_made_its_weight() -> None:
    def run(m: Any, y: Tensor) -> Tensor:
        return F.conv2d(y[:1], y.mean((2, 3)).view(2, 8, 1, 1))

    net, x = mask_model(Net(run)), torch.randn(2, 3, 4, 4)
    assert MacBudget(net, x).dense_macs == counted_macs(net, x) == 2 * CONVS + 16 * 8 * 2


def test_attention_of_other_key_and_value_widths_counts_its_projections() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    net = Net(lambda m, y: m.att(t := tokens(y), t[..., :6], t[..., :4], need_weights=False)[0], att=layer)
    x = torch.randn(2, 3, 4, 4)
    assert MacBudget(net, x).dense_macs == counted_macs(net, x) == 2 * CONVS + 2 * 16 * 8 * (8 + 6 + 4 + 8)


@torch.library.custom_op("mmitp_test::mix", mutates_args=())
def mix(x: Tensor, w: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() @ w.numpy())


def test_what_multiplies_unknown_to_torch_is_named_as_not_counted() -> None:
    def run(m: Any, y: Tensor) -> Any:
        with torch.no_grad():
            return torch.cdist(tokens(y), m.cube[0]), mix(tokens(y), m.w)

    budget = MacBudget(mask_model(Net(run)), torch.randn(2, 3, 4, 4))
    assert budget.dense_macs == 2 * CONVS
    told = [why for why in budget.unfollowed.values() if why.endswith("not counted")]
    assert len(told) == 2
    assert "_cdist_forward" in told[0]
    assert "mmitp_test::mix" in told[1]


def test_a_weight_that_no_operation_reads_is_named() -> None:
    def run(m: Any, y: Tensor) -> Tensor:
        return y * float(m.w.detach().numpy().sum()) + m.cube.sum()

    budget = MacBudget(mask_model(Net(run)), torch.randn(2, 3, 4, 4))
    assert "no operation of torch read this weight" in budget.unfollowed["w"]
    assert "cube" not in budget.unfollowed


def test_elementwise_work_of_weights_counts_nothing_and_is_followed() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(8, 4, 4))

        def forward(self, y: Tensor) -> Tensor:
            return y * self.gamma

    net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), Scale(), nn.Conv2d(8, 4, 1)))
    budget = MacBudget(net, torch.randn(1, 3, 4, 4))
    assert budget.unfollowed == {}
    assert budget.dense_macs == 16 * (3 * 8 + 8 * 4)
