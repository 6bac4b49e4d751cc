"""The report's reasons, and the check's independent counter and random masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmitp.pruning import MacBudget, mask_model
from mmitp.pruning.check import check_slimming, counted_macs, randomize_to
from mmitp.pruning.report import dense_reason, parameter_counts, prunable_outputs, report_text


def model() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 1),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 6, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1)),
        nn.Conv2d(6, 6, 1),
        nn.Conv2d(6, 5, 1),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    net[6].weight.requires_grad_(False)
    return net


def test_reasons_name_what_each_layer_is() -> None:
    budget = MacBudget(mask_model(model(), exclude="7"), torch.randn(1, 3, 4, 4))
    reasons = {record.name: dense_reason(budget, record).partition(":")[0] for record in budget.layers}
    assert reasons == {
        "0": "stem",
        "1": "grouped",
        "2": "",
        "4": "",
        "5.conv2d (conv2d)": "called as a function with a weight of its own",
        "6": "frozen",
        "7": "left out by include or exclude",
        "9": "linear",
    }
    outputs = {record.name: prunable_outputs(budget, record) for record in budget.layers}
    # the depthwise layer and the stem go with the reader of the first; GroupNorm and dense readers hold the others
    assert {name for name, n in outputs.items() if n} == {"0", "1"}
    assert outputs["1"] == 4


def test_report_states_dense_macs_and_the_cheapest_ratio() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.GroupNorm(1, 6)))
    text = report_text(MacBudget(net, torch.randn(1, 3, 2, 2)))
    assert "layers that can be pruned: 1 of 2, 66.7% of the operations" in text
    assert "dense MACs: 144 " in text
    assert "cheapest reachable ratio: 0.2500" in text
    assert "2: group_norm is not known to treat channels one by one" in text


def two_layers(granularity: str) -> tuple[nn.Sequential, MacBudget]:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)), granularity)
    return net, MacBudget(net, torch.randn(1, 3, 2, 2))


def test_parameters_kept_are_those_of_the_slimmed_network() -> None:
    net, budget = two_layers("channel")
    # 16 in the first layer, 8 in the norm, 30 in the second; each of its inputs costs 4 + 2 + 6.
    assert parameter_counts(net, budget) == (54, 54)
    net[2].freeze_mask(torch.tensor([True, False, False, True]))
    assert parameter_counts(net, budget) == (54, 54 - 2 * 12)
    assert net[2].weight.shape == (6, 4, 1, 1)


def test_parameters_kept_of_single_weights_are_the_non_zeros() -> None:
    net, budget = two_layers("weight")
    pattern = torch.ones(6, 4, 1, 1, dtype=torch.bool)
    pattern[:, 0] = False
    net[2].freeze_mask(pattern)
    assert parameter_counts(net, budget) == (54, 54 - 6)


def test_random_masks_come_close_to_the_target() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1)))
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    assert randomize_to(budget, 0.5) == pytest.approx(0.5, abs=0.02)
    assert budget.ratio().item() <= 0.5


def test_a_model_that_cannot_reach_the_target_goes_half_the_way() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 64, 1)), include="1")
    budget = MacBudget(net, torch.randn(1, 8, 4, 4))
    net2 = mask_model(nn.Sequential(nn.Conv2d(3, 64, 7), nn.GroupNorm(1, 64), nn.Conv2d(64, 64, 1)))
    held = MacBudget(net2, torch.randn(1, 3, 8, 8))
    assert budget.min_ratio() < 0.5 < held.min_ratio()
    assert randomize_to(held, 0.5) == pytest.approx((1 + held.min_ratio()) / 2, abs=0.02)


def test_check_passes_on_a_sound_model_and_counts_independently() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)))
    outcome = check_slimming(net, torch.randn(1, 3, 8, 8))
    assert outcome.passed
    assert outcome.macs_budget == outcome.macs_counted
    assert net[3].mask_frozen
    assert net.training


def test_the_counter_leaves_attention_products_out() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    assert counted_macs(Attention(), torch.randn(2, 5, 8)) == 2 * 5 * 8 * 24
    assert counted_macs(nn.MultiheadAttention(8, 2, batch_first=True), (torch.randn(2, 5, 8),) * 3) == 2 * 5 * 8 * 8 * 4
