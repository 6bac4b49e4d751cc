"""The modulated deformable convolution under one mask: equality, counting, slimming."""

from __future__ import annotations

import pytest
import torch
from mmcv.ops import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from torch import Tensor, nn

from mmitp.models.dcn import MaskedDCNv2, SlimDCNv2
from mmitp.pruning import MacBudget, fold_masks, mask_model, masked_layers, slim
from mmitp.pruning.check import counted_macs
from mmitp.pruning.slim import difference


def dcn(i: int, o: int, **kw: int) -> ModulatedDeformConv2dPack:
    layer = ModulatedDeformConv2dPack(i, o, 3, padding=1, **kw)
    layer.conv_offset.weight.data.normal_(0, 0.1)
    layer.conv_offset.bias.data.normal_(0, 0.5)
    return layer


def net(**kw: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), dcn(4, 6, **kw), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()


def off(model: nn.Module, **channels: list[int]) -> None:
    with torch.no_grad():
        for name, entries in channels.items():
            masked_layers(model)[name].prune_mask.view(-1)[entries] = -1


def test_masking_keeps_keys_and_output() -> None:
    x = torch.randn(2, 3, 5, 6)
    model = net()
    keys, expected = list(model.state_dict()), model(x)
    mask_model(model)
    assert type(model[1]) is MaskedDCNv2
    assert type(model[1].conv_offset) is nn.Conv2d
    assert [k for k in model.state_dict() if "prune_" not in k] == keys
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_a_masked_channel_moves_neither_output_nor_offsets() -> None:
    layer = mask_model(nn.Sequential(dcn(4, 6)))
    off(layer, **{"0": [1, 2]})
    x = torch.randn(1, 4, 5, 5)
    other = x.clone()
    other[:, 1:3] = torch.randn(1, 2, 5, 5)
    assert torch.equal(layer(x), layer(other))


def test_the_mask_is_trained_through_product_and_offsets() -> None:
    layer = mask_model(nn.Sequential(dcn(4, 6)))
    layer(torch.randn(1, 4, 5, 5)).square().sum().backward()
    gradient = layer[0].prune_mask.grad
    assert gradient.abs().min() > 0
    layer.zero_grad()
    layer[0].weight.data.zero_()  # nothing but the offsets' way would be left, and it ends in a zero weight
    layer(torch.randn(1, 4, 5, 5)).square().sum().backward()
    assert layer[0].prune_mask.grad.abs().max() == 0


def test_macs_count_the_offset_convolution() -> None:
    model = mask_model(net())
    budget = MacBudget(model, torch.randn(1, 3, 5, 6))
    places = 30
    # 9 * 4 * 6 for the product, 9 * 4 * 27 for the offsets and modulations of nine taps
    assert {r.name: r.macs_kept for r in budget.table()} == {
        "0": places * 12,
        "1": places * (9 * 4 * 6 + 9 * 4 * 27),
        "3": places * 12,
    }
    off(model, **{"1": [0], "3": [1, 5]})
    assert {r.name: r.macs_kept for r in budget.table()} == {
        "0": places * 9,
        "1": places * (9 * 3 * 4 + 9 * 3 * 27),
        "3": places * 8,
    }
    budget.ratio().backward()
    ste = 0.2099871708
    # an input channel: the stem's 3, the product's 9 * 4 kept outputs, the offsets' 9 * 27
    expected = places * (3 + 9 * 4 + 9 * 27) / budget.dense_macs * ste
    assert model[1].prune_mask.grad[1].item() == pytest.approx(expected, rel=1e-6)


def test_weight_granularity_leaves_the_offsets_dense() -> None:
    model = mask_model(net(), granularity="weight")
    budget = MacBudget(model, torch.randn(1, 3, 5, 6))
    assert budget.ratio().item() == 1.0
    off(model, **{"1": [0, 1, 2]})
    assert budget.kept_macs() == budget.dense_macs - 3 * 30


@pytest.mark.parametrize("pattern", [{"1": [0, 3]}, {"3": [0, 2, 4]}, {"1": [1], "3": [1, 2, 3, 4, 5]}])
def test_slimmed_equals_masked(pattern: dict[str, list[int]]) -> None:
    x: Tensor = torch.randn(2, 3, 7, 5)
    model = mask_model(net())
    budget = MacBudget(model, x)
    off(model, **pattern)
    small = slim(model, x, budget)
    assert type(small[1]) is ModulatedDeformConv2dPack
    assert difference(model, small, x, rtol=1e-5) == ""
    assert MacBudget(small, x).dense_macs == budget.kept_macs()
    folded = net()
    folded.load_state_dict(fold_masks(model).state_dict(), strict=True)
    assert difference(folded, small, x, rtol=1e-5) == ""


def test_a_layer_that_nobody_reads_any_more_costs_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.c = (
                nn.Conv2d(3, 4, 1),
                dcn(4, 3, stride=2),
                dcn(4, 3, stride=2),
                nn.Conv2d(6, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    x = torch.randn(1, 3, 7, 5)
    model = mask_model(Two().eval())
    budget = MacBudget(model, x)
    off(model, c=[0, 1, 2])
    small = slim(model, x, budget)
    assert type(small.a) is SlimDCNv2
    assert {r.name: r.macs_kept for r in budget.table()}["a"] == 0
    assert difference(model, small, x, rtol=1e-5) == ""


def test_several_deformable_groups_stay_whole() -> None:
    model = mask_model(nn.Sequential(*net(deform_groups=2), nn.Conv2d(2, 2, 1)))
    assert list(masked_layers(model)) == ["3", "4"]
    x = torch.randn(1, 3, 5, 6)
    budget = MacBudget(model, x)
    off(model, **{"3": [0, 1], "4": [0]})
    assert budget.unfollowed == {"1": "its structure forbids removing single channels: counted, stays dense"}
    assert difference(model, slim(model, x, budget), x, rtol=1e-5) == ""


def test_unmodulated_deformable_convolutions_are_counted_and_stay_dense() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.offsets, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 18, 1), nn.Conv2d(6, 2, 1)
            self.given, self.own = DeformConv2d(4, 6, 3, padding=1), DeformConv2dPack(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last(self.own(self.given(x, self.offsets(x))))

    x = torch.randn(1, 3, 5, 6)
    model = mask_model(Given().eval())
    assert list(masked_layers(model)) == ["offsets", "last"]
    budget = MacBudget(model, x)
    off(model, offsets=[0], last=[0, 1])
    rows = {r.name: (r.macs_kept, r.out_kept) for r in budget.table()}
    assert rows["given"] == (30 * 9 * 4 * 6, 6)
    assert rows["own"] == (30 * (9 * 6 * 6 + 9 * 6 * 18), 6)
    assert set(budget.unfollowed) == {"given", "own"}
    assert difference(model, slim(model, x, budget), x, rtol=1e-5) == ""


def test_given_offsets_on_a_map_smaller_than_the_kernel_cost_the_enlarged_map() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = DeformConv2d(4, 5, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x, x.new_zeros(x.shape[0], 18, *x.shape[-2:]))

    x = torch.randn(1, 4, 2, 3)
    assert MacBudget(Net(), x).dense_macs == 4 * 5 * 9 * (3 * 3) == counted_macs(Net(), x)
