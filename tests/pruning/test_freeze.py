"""The freeze: never above the target, no further below than it has to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmitp.pruning import MacBudget, freeze_masks, mask_model, masked_layers, project
from mmitp.pruning.freeze import FILL_TOLERANCE, floors, lowest_ratio


def two_layers(a=6, b=5):
    """3 -> a -> b -> 2 channels by 1x1 convolutions on 1x1 images: MACs 3a + ab + 2b, masks on the last two."""
    net = nn.Sequential(nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 1), nn.Conv2d(b, 2, 1))
    mask_model(net)
    return net, MacBudget(net, torch.zeros(1, 3, 1, 1))


def set_masks(net, *values):
    for layer, value in zip(masked_layers(net).values(), values, strict=True):
        layer.prune_mask.data.copy_(torch.tensor(value))


def test_the_lowest_masks_go_first_and_no_more_than_needed():
    net, budget = two_layers(3, 2)  # dense: 9 + 6 + 4 = 19
    set_masks(net, [0.3, 0.1, 0.2], [0.5, 0.4])
    result = project(budget, 14 / 19)
    # Without the lowest mask, channel 1 of the first layer: 3*2 + 2*2 + 4 = 14.
    assert result.pattern.tolist() == [True, False, True, True, True]
    assert (result.switched_off, result.ratio) == (1, 14 / 19)
    assert result.threshold == pytest.approx(0.1)


def test_a_layer_keeps_its_highest_channel_however_low_it_is():
    net, budget = two_layers(3, 2)
    set_masks(net, [0.01, 0.02, 0.03], [5.0, 4.0])
    # The first layer down to its last channel: 3 + 2 + 4 = 9; one more step has to come from the second.
    assert project(budget, 9 / 19).pattern.tolist() == [False, False, True, True, True]
    assert project(budget, 8 / 19).pattern.tolist() == [False, False, True, True, False]


def test_a_target_that_is_met_changes_nothing():
    net, budget = two_layers()
    set_masks(net, [1.0, -1.0, 1.0, 1.0, -2.0, 1.0], [1.0, 1.0, -1.0, 1.0, 1.0])
    result = project(budget, 1.0)
    assert torch.equal(result.pattern, budget.flat_pattern())
    assert result.switched_off == result.switched_on == 0


def test_out_of_reach_is_an_error_with_the_cheapest_ratio():
    net, budget = two_layers(3, 2)
    with pytest.raises(ValueError, match=f"{6 / 19:.4f}"):
        project(budget, 5 / 19)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_never_above_the_target_and_as_full_as_a_channel_allows(data):
    net, budget = two_layers(data.draw(st.integers(2, 9)), data.draw(st.integers(2, 9)))
    for layer in masked_layers(net).values():
        n = layer.prune_mask.numel()
        values = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=n, max_size=n))
        layer.prune_mask.data.copy_(torch.tensor(values))
    target = data.draw(st.floats(budget.min_ratio() + 1e-6, 1.0))
    plain = project(budget, target)
    filled = project(budget, target, fill=True)
    limit = target * budget.dense_macs
    assert budget.macs_of(plain.pattern) <= limit
    assert budget.macs_of(filled.pattern) <= limit
    assert bool((filled.pattern >= plain.pattern).all())
    if budget.macs_of(filled.pattern) < (1 - FILL_TOLERANCE) * int(limit):
        for i in (~filled.pattern).nonzero().flatten():
            more = filled.pattern.clone()
            more[i] = True
            assert budget.macs_of(more) > limit
    freeze_masks(net, budget.split(filled.pattern))
    assert budget.kept_macs() == budget.macs_of(filled.pattern)


def test_freezing_takes_the_present_pattern_and_lets_only_weights_train():
    net, budget = two_layers()
    set_masks(net, [1.0, -1.0, 1.0, 1.0, -2.0, 1.0], [1.0, 1.0, -1.0, 1.0, 1.0])
    before = budget.kept_macs()
    assert freeze_masks(net) is net
    net(torch.randn(2, 3, 1, 1)).sum().backward()
    for layer in masked_layers(net).values():
        assert torch.equal(layer.prune_mask.grad, torch.zeros_like(layer.prune_mask))
        layer.prune_mask.data.neg_()
    assert budget.kept_macs() == before
    assert net[1].weight.grad.abs().sum() > 0


def test_unknown_layers_and_dense_models_are_named():
    net, _ = two_layers()
    with pytest.raises(ValueError, match="nonsense"):
        freeze_masks(net, {"nonsense": torch.ones(3)})
    with pytest.raises(ValueError, match="no mask"):
        freeze_masks(nn.Conv2d(3, 3, 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([-0.02, -1e-4, 0.0, 0.02]), st.sampled_from([1e-6, 1e-9, 0.0]))
def test_no_layer_loses_its_last_channel_however_close_its_masks_are(seed, level, spread):
    """Masks that travel as one front differ in the last place of float32 only."""
    net, budget = two_layers(16, 64)
    generator = torch.Generator().manual_seed(seed)
    for layer in masked_layers(net).values():
        layer.prune_mask.data.copy_(level + spread * torch.rand(layer.prune_mask.shape, generator=generator))
    for target in (0.6, 0.2, max(budget.min_ratio(), 0.02)):
        for divisor in (1, 8):
            if lowest_ratio(budget, divisor) > target:
                continue
            pattern = project(budget, target, divisor=divisor).pattern
            assert budget.macs_of(pattern) <= target * budget.dense_macs
            assert all(bool(part.any()) for part in budget.split(pattern).values())
    freeze_masks(net, budget.split(pattern))
    assert min(row.in_kept for row in budget.table()) > 0


def test_floors_are_a_part_of_each_masked_layer_at_least_one_and_none_elsewhere() -> None:
    widths = (3, 1, 8, 2)
    net = mask_model(nn.Sequential(*[nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:], strict=False)]))
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    assert [record.n_in for record in budget.layers] == [3, 1, 8]  # the first is the stem
    assert floors(budget, 0.0).tolist() == [0, 1, 1]
    assert floors(budget, 0.25).tolist() == [0, 1, 2]
    assert floors(budget, 0.26).tolist() == [0, 1, 3]


def test_layers_keep_the_same_channels_where_nothing_else_meets_the_target_and_no_more_of_them_than_needed() -> None:
    """Three readers of one stream, each with a favourite channel of its own: 1x1 images, MACs 12 + 3 * 4 dense."""

    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.c = (nn.Conv2d(i, o, 1) for i, o in ((3, 4), (4, 1), (4, 1), (4, 1)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x)
            return self.a(y) + self.b(y) + self.c(y)

    net = mask_model(Readers())
    budget = MacBudget(net, torch.zeros(1, 3, 1, 1))
    best = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.4, 0.3], [0.1, 0.4, 0.3, 0.2]]
    set_masks(net, *best)
    first = [1, 0, 0, 0]
    # Each its own favourite: 9 + 3; two of them the first channel: 6 + 3; all: 3 + 3.
    for limit, expected in ((12, [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]]), (9, [first, first, [0, 1, 0, 0]])):
        result = project(budget, limit / 24)
        assert [part.long().tolist() for part in budget.split(result.pattern).values()] == expected
        assert result.ratio == limit / 24
    assert project(budget, 6 / 24).pattern.long().tolist() == 3 * first
