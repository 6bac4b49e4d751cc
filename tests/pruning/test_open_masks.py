"""Masks that cannot count: not given where an example shows it, else held open; their layers are dense throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmitp.pruning import (
    MacBudget,
    MaskedConv2d,
    freeze_masks,
    mask_model,
    masked_layers,
    project,
    randomize_masks,
    share_masks,
    slim,
)
from mmitp.pruning.check import counted_macs
from mmitp.pruning.cost import ParameterCost
from mmitp.pruning.report import dense_reason


def conv(i: int, o: int, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2)


class Reused(nn.Module):
    """``c`` runs as a module and once more as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c, self.out = conv(3, 8), conv(8, 8), conv(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.c(F.relu(self.stem(x))))
        return self.out(F.relu(F.conv2d(y, self.c.weight, padding=1)))


class Scaled(nn.Module):
    """A convolution that never runs itself: only its weight is read (torchvision's Swin, LoRA, equalised rates)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c, self.out = conv(3, 8), conv(8, 8), conv(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.relu(self.stem(x)), self.c.weight * 0.1, self.c.bias, padding=1)
        return self.out(F.relu(y))


class TwoStems(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late, self.rgb, self.depth = conv(16, 4), conv(3, 8), conv(4, 8)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        depth = (depth - depth.mean()) / 2
        depth = F.pad(depth.flip(3), (1, 1, 1, 1))[..., 1:-1, 1:-1]
        return self.late(F.relu(torch.cat([self.rgb(rgb), self.depth(depth)], 1)))


class Tied(nn.Module):
    """A classifier that shares its weight with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l1, self.l2 = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.l2.weight = self.e.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.l2(F.relu(self.l1(self.e(i))))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "weight_read_elsewhere": (Reused, torch.randn(2, 3, 6, 6), "c"),
    "weight_read_only_by_functions": (Scaled, torch.randn(2, 3, 6, 6), "c"),
    "second_stem": (TwoStems, (torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)), "depth"),
}


@pytest.mark.parametrize("name", CASES)
def test_without_an_example_such_a_mask_is_held_open(name: str) -> None:
    make, x, layer = CASES[name]
    net = mask_model(make())
    assert layer in masked_layers(net)
    randomize_masks(net, 0.4, torch.Generator().manual_seed(0))
    budget = MacBudget(net, x)
    held = masked_layers(net)[layer]
    assert held.mask_frozen
    assert bool(held.binary_mask().all())
    assert layer not in dict(budget.masked)
    assert layer in budget.unfollowed
    rows = {row.name: row for row in budget.table()}
    if layer in rows:
        assert rows[layer].in_kept == rows[layer].in_channels
    result = project(budget, (budget.kept_macs() / budget.dense_macs + budget.min_ratio()) / 2)
    freeze_masks(net, budget.split(result.pattern))
    small = slim(net, x)
    assert counted_macs(small, x) == budget.kept_macs() < budget.dense_macs
    assert small.get_submodule(layer).weight.shape[1] == net.get_submodule(layer).weight.shape[1]


@pytest.mark.parametrize("name", CASES)
def test_with_an_example_there_is_no_such_mask_and_every_mask_gets_a_gradient(name: str) -> None:
    make, x, layer = CASES[name]
    net = mask_model(make(), example_inputs=x)
    assert masked_layers(net)
    assert layer not in masked_layers(net)
    out = net(*x) if isinstance(x, tuple) else net(x)
    out.square().sum().backward()
    assert all(m.prune_mask.grad is not None for m in masked_layers(net).values())


def test_naming_a_layer_that_cannot_carry_a_mask_is_an_error() -> None:
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"include names 'c', .* read by other code"):
        mask_model(Reused(), include=["c", "out"], example_inputs=x)
    with pytest.raises(ValueError, match=r"include names 'c', .* does not run"):
        mask_model(Scaled(), include=["c", "out"], example_inputs=x)


def test_an_image_layer_named_by_include_may_lose_channels() -> None:
    net = mask_model(TwoStems(), include=["depth", "late"], example_inputs=CASES["second_stem"][1])
    budget = MacBudget(net, CASES["second_stem"][1])
    assert list(dict(budget.masked)) == ["late", "depth"] or list(dict(budget.masked)) == ["depth", "late"]
    assert not masked_layers(net)["depth"].mask_frozen


def test_stems_are_told_by_the_pass_and_not_by_their_order() -> None:
    net = mask_model(TwoStems(), example_inputs=CASES["second_stem"][1])
    assert list(masked_layers(net)) == ["late"]
    budget = MacBudget(net, CASES["second_stem"][1])
    reasons = {record.name: dense_reason(budget, record) for record in budget.layers}
    assert reasons == {"rgb": "stem: reads the image", "depth": "stem: reads the image", "late": ""}


def test_embedded_tokens_are_no_image() -> None:
    net = mask_model(Tied(), linear=True, example_inputs=torch.randint(10, (1, 5)))
    assert list(masked_layers(net)) == ["l1"]


def test_layers_tied_to_others_get_no_mask_even_without_an_example() -> None:
    assert list(masked_layers(mask_model(Tied(), linear=True))) == ["l1"]


def test_tied_weights_are_dense_and_parameters_count_once() -> None:
    net, i = mask_model(Tied(), linear=True), torch.randint(10, (1, 5))
    budget = MacBudget(net, i, cost=ParameterCost())
    # the weight of embedding and classifier once, l1 with its bias
    assert budget.dense_cost == 10 * 8 + 8 * 8 + 8
    with torch.no_grad():
        net.l1.prune_mask[:3] = -1
    assert budget.kept_cost() == 10 * 8 + 8 * 5 + 8 == sum(p.numel() for p in slim(net, i, budget).parameters())


def test_two_layers_and_two_norms_of_one_weight_count_their_parameters_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.out = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 2)
            self.n1, self.n2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.b.weight, self.n2.weight = self.a.weight, self.n1.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.n2(self.b(F.relu(self.n1(self.a(self.stem(x)))))))

    net, x = mask_model(Net()), torch.randn(1, 3, 4, 4)
    budget = MacBudget(net, x, cost=ParameterCost())
    assert budget.dense_cost == sum(p.numel() for n, p in net.named_parameters() if not n.endswith("prune_mask"))
    randomize_masks(net, 0.5, torch.Generator().manual_seed(1))
    assert budget.kept_cost() == sum(p.numel() for p in slim(net, x, budget).parameters())


def test_a_mask_frozen_with_its_weight_is_held_open_beside_masks_that_train() -> None:
    net = nn.Sequential(conv(3, 8), MaskedConv2d(8, 8, 1), MaskedConv2d(8, 8, 1), conv(8, 2))
    net[1].requires_grad_(False)
    budget = MacBudget(net, torch.randn(1, 3, 4, 4))
    assert list(dict(budget.masked)) == ["2"]
    assert "does not train" in budget.unfollowed["1"]
    # a network at rest is none of that: its masks count
    net = nn.Sequential(conv(3, 8), MaskedConv2d(8, 8, 1), MaskedConv2d(8, 8, 1), conv(8, 2)).requires_grad_(False)
    assert list(dict(MacBudget(net, torch.randn(1, 3, 4, 4)).masked)) == ["1", "2"]


def test_frozen_patterns_stay_and_masks_are_held_again_after_unfreezing() -> None:
    net, x = mask_model(Reused()), torch.randn(2, 3, 6, 6)
    budget = MacBudget(net, x)
    for layer in masked_layers(net).values():
        layer.unfreeze_mask()
    budget.hold_masks()
    assert [layer.mask_frozen for layer in masked_layers(net).values()] == [True, False]
    pattern = torch.tensor([True] * 3 + [False] * 5)
    masked_layers(net)["c"].freeze_mask(pattern)
    MacBudget(net, x)
    assert masked_layers(net)["c"].binary_mask().bool().tolist() == pattern.tolist()


def test_open_masks_are_not_shared() -> None:
    net, x = mask_model(TwoStems()), CASES["second_stem"][1]
    assert share_masks(net, x) == []
