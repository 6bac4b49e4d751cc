"""The slimmed network trains as the masked one would have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmitp.pruning import MacBudget, SlimPlan, freeze_masks, mask_model, masked_layers, randomize_masks
from mmitp.pruning.live import plan_live, shrink_live, steps_elementwise
from mmitp.pruning.masks import MaskBank


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
    "fused_sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
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
    dtype: torch.dtype,
    keep: float,
    make: Any,
    clip: float | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[nn.Module, Any, MacBudget]:
    """A net trained for some steps with its masks frozen half-way, so that the state is full and unlike."""
    model = mask_model(Net().to(dtype)).to(memory_format=layout)
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


class Lars(torch.optim.SGD):
    """A step as long as the tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.norm() / p.grad.norm() * p.grad


def test_optimizers_are_tried_out_for_stepping_elementwise():
    parameters = [nn.Parameter(torch.ones(3, 4))]
    for name, make in OPTIMIZERS.items():
        assert steps_elementwise(make(parameters)), name
    for other in (Lars, torch.optim.Adafactor, torch.optim.LBFGS):
        assert not steps_elementwise(other(parameters, lr=0.0))


def test_factored_state_starts_anew_and_is_named():
    model, optimizer, budget = frozen_net(torch.float64, 0.5, torch.optim.Adafactor)
    restarted = shrink_live(model, plan_live(model, torch.randn(1, 3, 8, 8).double(), budget), optimizer)
    assert "a1.weight" in restarted
    assert all(optimizer.state[p] for n, p in model.named_parameters() if n not in restarted)
    train(model, optimizer, 2, seed=2)


def test_masks_leave_optimizer_and_model_and_every_group_stays():
    model = mask_model(Net())
    groups = [dict(params=[p], lr=0.1 + i) for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.Adam(groups)
    train(model, optimizer, 1, seed=1)
    before, rates = dict(model.named_parameters()), [group["lr"] for group in optimizer.param_groups]
    randomize_masks(model, 0.5, torch.Generator().manual_seed(5))
    freeze_masks(model)
    budget = MacBudget(model, torch.randn(1, 3, 8, 8))
    shrink_live(model, plan_live(model, torch.randn(1, 3, 8, 8), budget), optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    left = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in left] == [id(p) for p in model.parameters()]
    assert all(p is before[name] for name, p in model.named_parameters())
    for p in left:
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    train(model, optimizer, 2, seed=2)


def test_momentum_is_cut_by_the_channels_of_its_weight():
    model, optimizer, budget = frozen_net(torch.float64, 0.5, OPTIMIZERS["sgd"])
    plan = plan_live(model, torch.randn(1, 3, 8, 8).double(), budget)
    weights = dict(model.named_parameters())
    momentum = optimizer.state[weights["a1.weight"]]["momentum_buffer"].clone()
    bias = optimizer.state[weights["n1.bias"]]["momentum_buffer"].clone()
    shrink_live(model, plan, optimizer)
    rows, columns = plan.layers["a1"].out_keep, plan.layers["a1"].in_keep
    assert len(columns) < 8
    assert torch.equal(optimizer.state[weights["a1.weight"]]["momentum_buffer"], momentum[rows][:, columns])
    assert torch.equal(optimizer.state[weights["n1.bias"]]["momentum_buffer"], bias[plan.norms["n1"]])


@pytest.mark.parametrize("name", ["fused", "fused_sgd"])
def test_weights_and_state_keep_the_channels_last_layout(name):
    """A fused optimizer walks all of them in memory order: apart in layout, they mix up their entries silently."""
    masked, optimizer, budget = frozen_net(torch.float32, 0.6, OPTIMIZERS[name], layout=torch.channels_last)
    small, other = copy.deepcopy((masked, optimizer))
    shrink_live(small, plan_live(masked, torch.randn(1, 3, 8, 8), budget), other)
    assert {len({value.stride() for value in values}) for values in whole_state(small, other)} == {1}
    assert small.a1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.a1.weight.is_contiguous()
    small.to(memory_format=torch.channels_last)  # as loops and hooks do once more after slimming
    expected, losses = train(masked, optimizer, 20, seed=2), train(small, other, 20, seed=2)
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < 1e-3


def whole_state(model: nn.Module, optimizer: Any) -> list[list[Tensor]]:
    """Each image-like weight with its moments."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    return [[p, *(v for v in optimizer.state[p].values() if v.dim() == 4)] for p in weights]


class Twofold(Net):
    """A branch that runs in training only: the budget does not count its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.aux(x).mean((2, 3)) if self.training else out


def test_masks_that_do_not_count_stay_masks():
    """Zeros folded into a weight that trains on would grow again."""
    model = mask_model(Twofold().double(), exclude="fc")
    for layer in masked_layers(model).values():
        layer.prune_mask.data = layer.prune_mask.data.float()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    model.aux.prune_mask.data[1] = -1.0
    freeze_masks(model)
    x = torch.randn(1, 3, 8, 8).double()
    small, other = copy.deepcopy((model, optimizer))
    shrink_live(small, plan_live(model, x, MacBudget(model, x)), other)
    assert small.aux.weight.shape == (3, 2, 3, 3)
    expected, losses = train(model, optimizer, 20, seed=2), train(small, other, 20, seed=2)
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < 1e-10


def test_masks_on_single_weights_are_refused():
    model = mask_model(Net(), granularity="weight")
    with pytest.raises(ValueError, match="masks single weights"):
        plan_live(model, torch.randn(1, 3, 8, 8), MacBudget(model, torch.randn(1, 3, 8, 8)))


def test_a_plan_for_another_model_changes_nothing():
    model = mask_model(Net())
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="does not have"):
        shrink_live(model, SlimPlan.from_spec(dict(layers={"other": dict(inputs=1, outputs=1)}, norms={})))
    assert {name: p.shape for name, p in before.items()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_layer_that_computes_nothing_any_more_passes_on_zero_gradients():
    """As under the mask; DistributedDataParallel would wait for a parameter that gets none."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.a(self.before(x)), self.b(x)], 1))

    model = mask_model(Branches())
    model.last.prune_mask.data[:4] = -1.0  # all that `a` computes
    freeze_masks(model)
    x = torch.randn(2, 3, 4, 4)
    expected = model(x).detach()
    shrink_live(model, plan_live(model, x, MacBudget(model, x)), torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.a.weight.numel() == 0
    out = model(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert float(model.before.weight.grad.abs().sum()) == 0 < float(model.b.weight.grad.abs().sum())
