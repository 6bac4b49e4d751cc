"""The control of pruning: every tensor narrower by the same part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmitp.pruning import MacBudget, freeze_masks, mask_model, share_masks, slim
from mmitp.pruning.narrow import narrow_pattern, weight_norms


class Stream(nn.Module):
    """Three tensors: a stream of 16 channels that two blocks add to, and 24 and 8 channels inside these."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a2(self.a1(x).relu())
        return self.last(x + self.b2(self.b1(x).relu()))


def masked_stream() -> tuple[nn.Module, Tensor, MacBudget]:
    torch.manual_seed(0)
    net, x = mask_model(Stream()), torch.randn(1, 3, 6, 6)
    share_masks(net, x)
    return net, x, MacBudget(net, x)


@pytest.mark.parametrize("target", [0.8, 0.5, 0.3, 0.1])
def test_every_tensor_keeps_the_same_part(target: float) -> None:
    net, x, budget = masked_stream()
    pattern = narrow_pattern(budget, target)
    assert 0.9 * target < budget.cost_of(pattern) / budget.dense_cost <= target
    freeze_masks(net, budget.split(pattern))
    small = slim(net, x, budget)
    kept = {small.stem.out_channels: 16, small.a1.out_channels: 24, small.b1.out_channels: 8}
    shares = [(width / dense, 1 / dense) for width, dense in kept.items()]
    # there is one share that no tensor is more than a channel away from
    assert max(share - step for share, step in shares) <= min(share + step for share, step in shares)
    assert all(type(module) in (nn.Conv2d, Stream) for module in small.modules())  # nothing is gathered


def test_which_channels_stay_goes_by_their_importance() -> None:
    net, _, budget = masked_stream()
    importance = torch.arange(budget.n_entries).float()  # the last of each tensor are the largest
    kept = budget.split(narrow_pattern(budget, 0.5, importance=importance))
    assert all(part[-1] and not part[0] for part in kept.values())
    in_order = budget.split(narrow_pattern(budget, 0.5))
    assert [part.sum() for part in kept.values()] == [part.sum() for part in in_order.values()]
    assert all(torch.equal(part, in_order[name].flip(0)) for name, part in kept.items())


def test_each_part_of_a_concatenation_is_a_tensor_of_its_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 12, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    net = mask_model(Net())
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    # a channel costs 3 + 2 of 80 multiplications a pixel, so half of them are on
    assert narrow_pattern(budget, 0.5).tolist() == [True] * 2 + [False] * 2 + [True] * 6 + [False] * 6


def test_a_divisor_holds_and_a_target_out_of_reach_is_refused() -> None:
    _, _, budget = masked_stream()
    parts = budget.split(narrow_pattern(budget, 0.5, divisor=4))
    assert all(int(part.sum()) % 4 == 0 for part in parts.values())
    with pytest.raises(ValueError, match="target"):
        narrow_pattern(budget, 0.001)


def test_weight_norms_by_hand() -> None:
    """Two layers that read one tensor by one mask: each one's L1 norms over its mean, added up."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x).mean() + self.c(x).mean()

    net, x = mask_model(Net()), torch.randn(1, 3, 2, 2)
    net.b.weight.data = torch.tensor([[1.0, -2.0], [2.0, 7.0]]).view(2, 2, 1, 1)  # norms 3 and 9, mean 6
    net.c.weight.data = torch.tensor([[-3.0, 1.0]]).view(1, 2, 1, 1)  # 3 and 1, mean 2
    share_masks(net, x)
    torch.testing.assert_close(weight_norms(MacBudget(net, x)), torch.tensor([0.5 + 1.5, 1.5 + 0.5]))


@pytest.mark.parametrize("target", [50, 0, float("nan"), "0.5"])
def test_a_target_that_is_no_part_is_refused(target: object) -> None:
    with pytest.raises(ValueError, match=r"target must be a fraction of the dense operations in \(0, 1\]"):
        narrow_pattern(masked_stream()[2], target)  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", [torch.ones(3), torch.full((80,), torch.nan), [1.0] * 80])
def test_importance_is_one_finite_number_for_each_entry(importance: object) -> None:
    with pytest.raises(ValueError, match="a vector of 48 finite numbers"):
        narrow_pattern(masked_stream()[2], 0.5, importance=importance)  # type: ignore[arg-type]
