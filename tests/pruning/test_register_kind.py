"""A layer type of one's own: one registration to mask, count, cut and wire it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmitp.pruning import MacBudget, MaskedLayer, freeze_masks, mask_model, masked_layers, register_kind, slim
from mmitp.pruning import layers as module
from mmitp.pruning.layers import Conv2dKind
from mmitp.pruning.slim_layers import SlimConv2d, SlimLayer


class CentredConv2d(nn.Conv2d):
    """A convolution whose weights of every output channel have zero mean along the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((2, 3), keepdim=True), self.bias)


class MaskedCentredConv2d(MaskedLayer, CentredConv2d, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return CentredConv2d.forward(self, self.masked_input(x))


class SlimCentredConv2d(SlimLayer, CentredConv2d, nn.Conv2d):
    def _nothing(self, x: Tensor) -> Tensor:
        return SlimConv2d._nothing(self, x)


class CentredKind(Conv2dKind):
    dense = (CentredConv2d,)
    masked = MaskedCentredConv2d


@pytest.fixture(autouse=True)
def _own_tables() -> Iterator[None]:
    tables = [(table, dict(table)) for table in (module._KINDS, module._SLIM)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


class Stream(nn.Module):
    """Two readers of one stream, each with channels of its own: both gather, and the layer under test scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 4, 1), CentredConv2d(4, 4, 3, padding=1)
        self.b = CentredConv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.b(x + self.a(x))


@torch.no_grad()
def pruned() -> nn.Module:
    net = mask_model(Stream())
    masks = masked_layers(net)
    masks["a"].prune_mask.copy_(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    masks["b"].prune_mask.copy_(torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    return freeze_masks(net)


X = torch.randn(1, 3, 5, 5)


def test_one_registration_masks_counts_cuts_and_wires() -> None:
    register_kind(CentredKind(), slim=SlimCentredConv2d)
    net = pruned()
    assert [type(layer) for layer in masked_layers(net).values()] == [MaskedCentredConv2d] * 2
    budget = MacBudget(net, X)
    # positions * kernel * inputs * outputs; the stem computes what a or b reads (2nd to 4th), a what b reads
    assert budget.kept_macs() == 25 * (3 * 3 + 9 * 2 * 2 + 9 * 2 * 2)
    small = slim(net, X, budget)
    assert (type(small.a), type(small.b)) == (SlimCentredConv2d, SlimCentredConv2d)
    assert small.a.weight.shape == (2, 2, 3, 3)
    torch.testing.assert_close(small(X), net(X))


def test_a_kind_without_a_type_that_gathers_says_what_is_missing() -> None:
    register_kind(CentredKind())
    net = pruned()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"CentredConv2d has to gather.*register_kind\(kind, slim="):
        slim(net, X)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_slim_type_of_another_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="SlimConv2d must derive from SlimLayer and from CentredConv2d"):
        register_kind(CentredKind(), slim=SlimConv2d)
    assert CentredConv2d not in module._KINDS


def test_a_class_in_place_of_a_kind_is_refused_and_leaves_the_others() -> None:
    with pytest.raises(ValueError, match=r"register_kind\(MyKind\(\)\)"):
        register_kind(CentredKind)  # type: ignore[arg-type]
    assert CentredConv2d not in module._KINDS
