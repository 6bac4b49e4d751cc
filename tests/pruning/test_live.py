"""The slimmed network trains as the masked one would have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmitp.pruning import MacBudget, freeze_masks, mask_model, masked_layers, randomize_masks
from mmitp.pruning.live import plan_live, shrink_live


class Net(nn.Module):
    """Residual stream, concatenation, depthwise and transposed convolution, biases, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.a1, self.n1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a2, self.n2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b1, self.act = nn.Conv2d(8, 8, 1), nn.PReLU(8)
        self.deep, self.n3 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.b2 = nn.Conv2d(8, 8, 1)
        self.up, self.n4 = nn.ConvTranspose2d(16, 5, 2, 2), nn.BatchNorm2d(5)
        self.last = nn.Conv2d(5, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.n2(self.a2(self.n1(self.a1(x)).relu_()))
        y = x + self.b2(self.n3(self.deep(self.act(self.b1(x)))).relu())
        x = self.n4(self.up(torch.cat([x, y], 1))).relu()
        return self.fc(self.last(x).relu().mean((2, 3)))


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
}


def train(model: nn.Module, optimizer: Any, steps: int, seed: int, clip: float | None = None) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
        y = torch.randint(3, (4,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            masks = {id(layer.prune_mask) for layer in masked_layers(model).values()}
            nn.utils.clip_grad_norm_([p for p in model.parameters() if id(p) not in masks], clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def frozen_net(
    dtype: torch.dtype, keep: float, make: Any, clip: float | None = None
) -> tuple[nn.Module, Any, MacBudget]:
    """A net trained for some steps with its masks frozen half-way, so that the state is full and unlike."""
    model = mask_model(Net().to(dtype))
    for layer in masked_layers(model).values():
        layer.prune_mask.data = layer.prune_mask.data.float()
    optimizer = make(model.parameters())
    train(model, optimizer, 3, seed=1, clip=clip)
    randomize_masks(model, keep, torch.Generator().manual_seed(5))
    freeze_masks(model)
    return model, optimizer, MacBudget(model, torch.randn(1, 3, 8, 8).to(dtype))


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_losses_follow_those_of_the_masked_continuation(name, dtype, bound, clip):
    masked, optimizer, budget = frozen_net(dtype, 0.6, OPTIMIZERS[name], clip)
    small, other = copy.deepcopy((masked, optimizer))
    plan = plan_live(masked, torch.randn(1, 3, 8, 8).to(dtype), budget)
    assert shrink_live(small, plan, other) == []
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in masked.parameters())
    expected = train(masked, optimizer, 20, seed=2, clip=clip)
    losses = train(small, other, 20, seed=2, clip=clip)
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < bound
    assert max(expected) - min(expected) > 0.01


def test_masks_that_are_binarised_together_hold_nothing_in_the_recorded_pass():
    model = mask_model(Net())
    bank = MaskBank(model, masked_layers(model).values())
    budget = MacBudget(model, torch.randn(1, 3, 8, 8))
    bank.remove()
    assert budget.unfollowed == MacBudget(model, torch.randn(1, 3, 8, 8)).unfollowed == {}
