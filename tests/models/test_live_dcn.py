"""Deformable convolutions slimmed in mid-training go on as their masked ones would, offset convolutions included."""

from __future__ import annotations

import copy

import torch
from mmcv.ops import ModulatedDeformConv2dPack
from torch import Tensor, nn

import mmitp.models  # noqa: F401  makes the deformable convolution known to the core
from mmitp.pruning import MacBudget, freeze_masks, mask_model, masked_layers, randomize_masks
from mmitp.pruning.live import plan_live, shrink_live
from mmitp.pruning.progressive import entries_to_keep, note_cut, plan_cut


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.first = ModulatedDeformConv2dPack(6, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.second = ModulatedDeformConv2dPack(12, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = torch.cat([x, self.norm1(self.first(x)).relu()], 1)
        return self.head(self.second(x).relu())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(2, 3, 6, 8, generator=generator, dtype=torch.float64)
        loss = (model(x) - x[:, :2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_follow_those_of_the_masked_continuation() -> None:
    model = mask_model(Net().double())
    for layer in masked_layers(model).values():
        layer.prune_mask.data = layer.prune_mask.data.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, optimizer, 3, seed=1)
    randomize_masks(model, 0.5, torch.Generator().manual_seed(2))
    freeze_masks(model)
    x = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    small, other = copy.deepcopy((model, optimizer))
    assert shrink_live(small, plan_live(model, x, MacBudget(model, x)), other) == []
    assert small.second.conv_offset.weight.shape[1] == small.second.weight.shape[1] < 12
    moment = other.state[small.second.conv_offset.weight]["exp_avg"]
    assert moment.shape == small.second.conv_offset.weight.shape
    expected, losses = train(model, optimizer, 20, seed=3), train(small, other, 20, seed=3)
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < 1e-10
    assert max(expected) > 1.01 * min(expected)


def test_a_cut_under_masks_that_train_on_goes_on_as_the_uncut_network() -> None:
    model = mask_model(Net().double())
    generator = torch.Generator().manual_seed(2)
    for layer in masked_layers(model).values():
        layer.prune_mask.data = torch.rand(layer.prune_mask.shape, generator=generator) - 0.5
    groups: list[dict] = [dict(params=[p]) for n, p in model.named_parameters() if not n.endswith("prune_mask")]
    masks = [layer.prune_mask for layer in masked_layers(model).values()]
    optimizer = torch.optim.AdamW([*groups, dict(params=masks, lr=0.0)], lr=0.01, weight_decay=0.1)
    train(model, optimizer, 3, seed=1)
    x = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    small, other = copy.deepcopy((model, optimizer))
    budget = MacBudget(small, x)
    ratio = budget.ratio().item()
    keep = entries_to_keep(budget, ~budget.flat_pattern(), 0.9)
    plan, whole_tensors = plan_cut(small, budget, (x,), keep)
    assert shrink_live(small, plan, other, keep_masks=True) == []
    note_cut(small, budget, keep, whole_tensors)
    assert budget.ratio().item() == ratio
    assert small.second.conv_offset.weight.shape[1] == small.second.prune_mask.numel() < 12
    expected, losses = train(model, optimizer, 10, seed=3), train(small, other, 10, seed=3)
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < 1e-10
