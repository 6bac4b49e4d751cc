"""Kept channels as multiples: which go, which stay, what cannot be reached."""

import pytest
import torch
from torch import nn

from mmitp.pruning import MacBudget, mask_model, masked_layers, project
from mmitp.pruning.divisor import divisor_of
from mmitp.pruning.freeze import lowest_ratio


def chain(a, b):
    """3 -> a -> b -> 2 channels by 1x1 convolutions on 1x1 images: MACs 3a + ab + 2b, masks on the last two."""
    net = nn.Sequential(nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 1), nn.Conv2d(b, 2, 1))
    mask_model(net)
    return net, MacBudget(net, torch.zeros(1, 3, 1, 1))


class Residual(nn.Module):
    """8 channels x; y = x + b(x); both read."""

    def __init__(self):
        super().__init__()
        self.stem, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.b(x))


def set_masks(net, *values):
    for layer, value in zip(masked_layers(net).values(), values, strict=True):
        layer.prune_mask.data.copy_(torch.tensor(value))


def test_each_layer_goes_to_the_nearest_multiple():
    net, budget = chain(8, 8)
    # 5 and 7 kept: 5 is nearer to 4 and loses its lowest, 7 nearer to 8 and gains its only dropped one
    set_masks(net, [0.5, 0.4, -1.0, 0.1, 0.3, -1.0, -1.0, 0.2], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0])
    result = project(budget, 1.0, divisor=4)
    assert result.pattern.tolist() == [True, True, False, False, True, False, False, True] + [True] * 8
    assert (result.switched_off, result.switched_on) == (1, 1)
    assert result.threshold == pytest.approx(0.1)
    assert result.ratio == (3 * 4 + 4 * 8 + 2 * 8) / (3 * 8 + 8 * 8 + 2 * 8)


def test_the_target_is_met_in_multiples():
    net, budget = chain(8, 8)
    set_masks(net, [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1])
    # dense 104; the first layer's lower half costs 4 * (3 + 8) = 44, so 60 are left
    assert project(budget, 60.5 / 104, divisor=4).pattern.tolist() == [True] * 4 + [False] * 4 + [True] * 8
    # one below: the second layer's half goes too, 3 * 4 + 4 * 4 + 2 * 4 = 36
    assert project(budget, 59.5 / 104, divisor=4).ratio == 36 / 104
    # or back up to the first layer with half of the second: 3 * 8 + 8 * 4 + 2 * 4 = 64 would be too much to fill with
    assert project(budget, 59.5 / 104, fill=True, divisor=4).ratio == 36 / 104


def test_fewer_channels_than_the_divisor_stay_all():
    net, budget = chain(3, 8)
    set_masks(net, [1.0, -1.0, -1.0], [1.0] * 8)
    assert project(budget, 1.0, divisor=4).pattern.all()


def test_auto_steps_are_at_most_an_eighth_of_a_layer_and_at_most_8():
    widths = torch.arange(1, 300)
    steps = divisor_of(widths, "auto")
    assert divisor_of(torch.tensor([1, 15, 16, 31, 32, 63, 64, 1000]), "auto").tolist() == [1, 1, 2, 2, 4, 4, 8, 8]
    assert bool((steps * 8 <= widths)[widths >= 8].all())
    assert bool((steps.diff() >= 0).all())


def test_auto_takes_the_step_of_each_layers_own_width():
    net, budget = chain(16, 32)
    # 9 of 16 are nearest to 8 and 10, of which the lower; 17 of 32 are nearest to 16
    set_masks(net, [1.0] * 8 + [0.5] + [-1.0] * 7, [1.0] * 16 + [0.5] + [-1.0] * 15)
    result = project(budget, 1.0, divisor="auto")
    assert [int(part.sum()) for part in budget.split(result.pattern).values()] == [8, 16]
    # 11 of 16 and 19 of 32: 11 stands between 10 and 12 and goes down, 19 is nearer to 20
    set_masks(net, [1.0] * 10 + [0.5] + [-1.0] * 5, [1.0] * 19 + [-1.0] * 13)
    result = project(budget, 1.0, divisor="auto")
    assert [int(part.sum()) for part in budget.split(result.pattern).values()] == [10, 20]


def test_what_two_readers_keep_together_is_a_multiple_too():
    net = mask_model(Residual())
    budget = MacBudget(net, torch.zeros(1, 3, 1, 1))
    # b reads channels 0-3, the head 2-5: six of the stem's eight would be computed, and both read four
    set_masks(net, [4.0, 4.0, 4.0, 4.0, -1.0, -1.0, -2.0, -3.0], [-1.0, -1.0, 3.0, 3.0, 3.0, 3.0, -2.0, -3.0])
    pattern = project(budget, 1.0, divisor=4).pattern
    read_b, read_head = pattern[:8], pattern[8:]
    assert int((read_b | read_head).sum()) in (4, 8)
    assert int(read_b.sum()) in (4, 8) and int(read_head.sum()) in (4, 8)


def test_out_of_reach_is_an_error_with_the_cheapest_ratio():
    net, budget = chain(8, 8)
    set_masks(net, [1.0] * 8, [1.0] * 8)
    assert lowest_ratio(budget, 4) == 36 / 104
    assert lowest_ratio(budget) == 6 / 104
    with pytest.raises(ValueError, match=f"4 input channel.*{36 / 104:.4f}"):
        project(budget, 35 / 104, divisor=4)
    for wrong in (-1, 0, 2.5, "all", True):
        with pytest.raises(ValueError, match="divisor"):
            project(budget, 0.5, divisor=wrong)
    with pytest.raises(ValueError, match="divisor='auto'"):
        project(budget, 1 / 1000, divisor="auto")
