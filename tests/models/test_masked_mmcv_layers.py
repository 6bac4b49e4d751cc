"""mmcv's own layer types under masks: same results as theirs, counted, slimmed, and turned back."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.wrappers import Conv2d, ConvTranspose2d, Linear
from torch import Tensor, nn

import mmitp.models.masked  # noqa: F401  makes the types known
from mmitp.pruning import MacBudget, SlimPlan, apply_plan, fold_masks, mask_model, masked_layers, slim
from mmitp.pruning.layers import kind_of
from mmitp.pruning.slim import LayerPlan, difference, shrink_layer, slim_with_plan


@pytest.mark.parametrize("geometry", [dict(stride=2), dict(stride=3, dilation=2), dict(stride=(2, 1)), dict()])
@pytest.mark.parametrize("size", [(7, 8), (5, 4), (1, 6)])
def test_adaptive_padding_is_mmcvs(geometry: dict, size: tuple[int, int]) -> None:
    layer = Conv2dAdaptivePadding(4, 5, 3, **geometry)
    x = torch.randn(2, 4, *size)
    expected = layer(x)
    torch.testing.assert_close(mask_model(nn.Sequential(layer))(x), expected)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dAdaptivePadding(3, 6, 3, stride=2)
        self.depthwise = Conv2dAdaptivePadding(6, 6, 3, stride=2, groups=6)
        self.a, self.b = Conv2dAdaptivePadding(6, 4, 3, stride=2), Conv2dAdaptivePadding(6, 4, 3, stride=2)
        self.plain, self.up, self.fc = Conv2d(8, 6, 1), ConvTranspose2d(6, 4, 2, 2), Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        x = self.up(self.plain(torch.cat([self.a(x), self.b(x)], 1)).relu())
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    "off", [{"plain": [0, 5]}, {"plain": [0, 1, 2, 3]}, {"a": [1], "b": [1, 2], "up": [0], "fc": [3]}]
)
def test_slimmed_equals_masked_and_comes_back(off: dict[str, list[int]]) -> None:
    torch.manual_seed(0)
    dense, x = Net().eval(), torch.randn(2, 3, 25, 30)
    model = mask_model(copy.deepcopy(dense), linear=True)
    assert list(masked_layers(model)) == ["a", "b", "plain", "up", "fc"]
    budget = MacBudget(model, x)
    assert budget.unfollowed == {}
    with torch.no_grad():
        for name, entries in off.items():
            masked_layers(model)[name].prune_mask[entries] = -1
    small, plan = slim_with_plan(model, x, budget)
    assert difference(model, small, x, rtol=1e-5) == ""
    assert MacBudget(slim(model, x), x).dense_macs == budget.kept_macs() < budget.dense_macs
    rebuilt = apply_plan(copy.deepcopy(dense), SlimPlan.from_spec(plan.spec()))
    rebuilt.load_state_dict(small.state_dict())
    assert difference(small, rebuilt, x, rtol=0) == ""
    fold_masks(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Conv2dAdaptivePadding(4, 5, 3, stride=2), torch.ones(1, 4, 5, 6)),
        (Conv2d(4, 5, 3, stride=2, padding=1), torch.ones(1, 4, 5, 6)),
        (ConvTranspose2d(4, 5, 3, stride=2, output_padding=1), torch.ones(1, 4, 5, 6)),
        (Linear(4, 5), torch.ones(2, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("outputs", [0, 2, 5])
def test_layers_take_their_input_by_mmcvs_name_and_give_its_shape(layer: nn.Module, x: Tensor, outputs: int) -> None:
    layer = copy.deepcopy(layer)
    expected = layer(x=x)
    masked = mask_model(nn.Sequential(copy.deepcopy(layer)), include=["0"])[0]
    assert isinstance(masked, type(layer))
    assert torch.equal(masked(x=x), expected)
    kept, kind = torch.arange(outputs), kind_of(layer)
    assert kind is not None
    shrink_layer(layer, kind, LayerPlan(torch.arange(4), kept, None, kept, 5))
    dim = -1 if kind.linear else 1
    out = layer(x=x)
    torch.testing.assert_close(out.narrow(dim, 0, outputs), expected.narrow(dim, 0, outputs))
    assert out.shape == expected.shape
    assert not out.narrow(dim, outputs, 5 - outputs).any()
