"""What attack_mode promises about normalisation, dropout and parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from mmitp.attacks import attack_mode, cross_entropy, fgsm_rs


class DropPath(nn.Module):
    """Named as model zoos name it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 if self.training else x


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    frozen = nn.BatchNorm2d(4).eval()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 4, 1), frozen, nn.ReLU())
    return nn.Sequential(net, nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def attack(net: nn.Module, **mode: object) -> torch.Tensor:
    x = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    torch.manual_seed(1)
    with attack_mode(net, **mode):  # type: ignore[arg-type]
        return fgsm_rs(cross_entropy(net, y), x, eps=0.1, alpha=0.1, generator=torch.Generator().manual_seed(0))


def test_batch_uses_batch_statistics_and_leaves_the_running_ones_exactly() -> None:
    net, reference = make_net(), make_net()
    before = copy.deepcopy(net.state_dict())
    in_batch, in_train = attack(net, batchnorm="batch"), attack(reference, batchnorm="train")
    assert torch.equal(in_batch, in_train)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not torch.equal(reference[0][1].running_mean, before["0.1.running_mean"])
    assert torch.equal(reference[0][3].running_mean, before["0.3.running_mean"])  # a layer the run keeps in eval mode


def test_eval_uses_and_keeps_running_statistics_and_restores_modes() -> None:
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    in_eval = attack(net, batchnorm="eval")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert not torch.equal(in_eval, attack(net, batchnorm="batch"))


def test_dropout_can_be_switched_off() -> None:
    net = nn.Sequential(DropPath(), nn.Dropout(0.9))
    x = torch.ones(2, 3)
    with attack_mode(net, dropout="eval"):
        assert torch.equal(net(x), x)
    assert not net(x).any()


class Attention(nn.Module):
    """As mmpretrain's: a rate, used in training mode; and a child that must stay in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop, self.norm = 0.5, nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.norm.training
        return nn.functional.dropout(x, self.attn_drop, self.training)


@pytest.mark.parametrize(
    ("layer", "rate"),
    [
        (nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), "dropout"),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).self_attn, "dropout"),
        (Attention(), "attn_drop"),
    ],
)
def test_functional_dropout_can_be_switched_off(layer: nn.Module, rate: str) -> None:
    inputs = [torch.ones(4, 8)] if rate == "attn_drop" else [torch.ones(2, 5, 8)] * 3
    net = nn.ModuleList([layer])
    with attack_mode(net, dropout="eval"):
        assert layer.training
        one, other = (layer(*inputs) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert getattr(layer, rate) == 0.5
    with attack_mode(net, dropout="train"):
        assert getattr(layer, rate) == 0.5


class Counting(nn.Module):
    """A loss with state, as GHM has: one buffer is written to, the other replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.written += 1
        self.replaced = self.replaced + 1
        return self.norm(x)


@pytest.mark.parametrize("mode", [dict(batchnorm="batch"), dict(batchnorm="eval"), dict(freeze=True)])
def test_the_state_of_losses_is_put_back(mode: dict) -> None:
    net = Counting()
    before = copy.deepcopy(net.state_dict())
    with attack_mode(net, **mode):
        net(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        assert net.replaced == 1
    kept = [torch.equal(value, before[key]) for key, value in net.state_dict().items()]
    assert all(kept) is ("freeze" not in mode)  # running statistics move with batchnorm="train", as it says
    assert torch.equal(net.written, before["written"])
    assert torch.equal(net.replaced, before["replaced"])


def test_freeze_restores_each_parameters_own_flag() -> None:
    net = make_net()
    net[0][0].weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in net.parameters()]
    with attack_mode(net, freeze=True):
        assert not any(parameter.requires_grad for parameter in net.parameters())
    assert [parameter.requires_grad for parameter in net.parameters()] == flags


def test_everything_is_restored_when_the_attack_fails() -> None:
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    x = torch.rand(4, 3, 6, 6)

    def fail() -> None:
        with attack_mode(net, batchnorm="batch", dropout="eval", freeze=True):
            net(x)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert net[1].training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_gradients_of_a_later_pass_are_those_without_an_attack() -> None:
    """Restored running statistics must not disturb the training pass that follows, forward or backward."""
    grads = []
    for attacked in (False, True):
        net = make_net()
        if attacked:
            attack(net, batchnorm="batch")
        torch.manual_seed(2)
        net(torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))).square().sum().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert torch.equal(*grads)


def test_attacks_pass_through_activation_checkpointing() -> None:
    class Block(nn.Module):
        def __init__(self, with_cp: bool) -> None:
            super().__init__()
            self.with_cp = with_cp
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.with_cp and x.requires_grad:
                return torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=True)
            return self.conv(x)

    model = nn.Sequential(Block(True), Block(False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match="use_reentrant"):
        fgsm_rs(lambda v: nn.functional.cross_entropy(model(v), y), x, eps=0.1, alpha=0.1)
    with attack_mode(model):
        moved = fgsm_rs(lambda v: nn.functional.cross_entropy(model(v), y), x, eps=0.1, alpha=0.1)
    assert not torch.equal(moved, x)
    assert [model[0].with_cp, model[1].with_cp] == [True, False]


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="batchnorm must be"), attack_mode(nn.ReLU(), batchnorm="off"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="dropout must be"), attack_mode(nn.ReLU(), dropout="off"):  # type: ignore[arg-type]
        pass
