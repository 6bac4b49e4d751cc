"""Parameters and latency as the budget: exact counts, hand-derived interpolation, and a freeze under the target."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmitp.pruning import MacBudget, freeze_masks, mask_model, masked_layers, project, randomize_masks
from mmitp.pruning.cost import ParameterCost, make_cost
from mmitp.pruning.latency import LatencyCost
from mmitp.pruning.masks import ste_derivative
from mmitp.pruning.report import parameter_counts
from mmitp.pruning.slim import slim_with_plan


class Block(nn.Module):
    """A residual block with norms, a depthwise layer, a transposed layer and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.PReLU(6))
        self.a = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.PReLU())
        self.depthwise = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.b = nn.Conv2d(5, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.b(self.depthwise(self.a(x)))
        return self.fc(self.norm(self.up(x)).mean((2, 3))) * self.scale


def chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1))


def entry(n_in: int, n_out: int, inputs: list[int], outputs: list[int], ns: list[list[float]], **more: float) -> dict:
    return dict(
        n_in=n_in, n_out=n_out, pair_macs=0, inputs=inputs, outputs=outputs, ns=ns,
        **{**dict(gather=0.0, scatter=0.0, element=0.0), **more},
    )  # fmt: skip


def chain_table() -> dict[str, Any]:
    """Times of :func:`chain` at 5x5, in ns."""
    layers = {
        "0": entry(3, 4, [3], [1, 4], [[100.0, 700.0]], element=10.0),
        "2": entry(4, 2, [1, 2, 4], [1, 2], [[10.0, 20.0], [30.0, 60.0], [110.0, 200.0]], gather=40.0, scatter=7.0),
        "3": entry(2, 2, [1, 2], [2], [[50.0], [60.0]]),
    }
    for name, kernel in (("0", 9), ("2", 1), ("3", 1)):
        layers[name]["pair_macs"] = 25 * kernel
    return dict(format=1, shape=[5, 5], constant=1000.0, layers=layers)


def masked_chain(second: list[float], third: list[float]) -> nn.Module:
    model = mask_model(chain())
    layers = masked_layers(model)
    assert list(layers) == ["2", "3"]
    layers["2"].prune_mask.data.copy_(torch.tensor(second).view_as(layers["2"].prune_mask))
    layers["3"].prune_mask.data.copy_(torch.tensor(third).view_as(layers["3"].prune_mask))
    return model


X = torch.zeros(1, 3, 5, 5)


def test_latency_is_interpolated_between_the_measured_channel_numbers() -> None:
    # Layer 0 computes the 3 channels layer 2 reads, layer 2 the one layer 3 reads.
    model = masked_chain([1.0, 0.5, 0.25, -1.0], [1.0, -1.0])
    budget = MacBudget(model, X, cost=LatencyCost(chain_table(), margin=0))
    # dense: layer 0 at (3, 4), layer 2 at (4, 2) without its gather and scatter, layer 3 at (2, 2)
    assert budget.dense_cost == (700 + 4 * 10) + (200 - 40 - 7) + 60 + 1000
    # layer 0: 100 + 2/3 * 600 and 3 * 10; layer 2: half way between 2 and 4 inputs, one output; layer 3: one input
    assert budget.kept_cost() == (500 + 30) + (30 + 110) / 2 + 50 + 1000
    assert budget.ratio().item() == pytest.approx(1650 / 1953, abs=1e-12)
    assert budget.hw_loss(0.5).item() == pytest.approx(1650 / 1953 - 0.5, abs=1e-12)
    assert (budget.what, budget.unit) == ("latency", "ns")
    assert budget.kept_macs() == 25 * (9 * 3 * 3 + 3 + 2)  # MACs are told as ever


def test_the_gradient_is_what_the_next_channel_would_save() -> None:
    model = masked_chain([1.0, 0.5, 0.25, -1.0], [1.0, -1.0])
    budget = MacBudget(model, X, cost=LatencyCost(chain_table(), margin=0))
    budget.ratio().backward()
    layers = masked_layers(model)

    def marginal(name: str) -> list[float]:
        mask = layers[name].prune_mask
        assert mask.grad is not None
        return (mask.grad / ste_derivative(mask.detach())).flatten().tolist()

    # layer 2, third input: itself 70 - 30; layer 0's third output: 200 + 10. Dropped ones: what they would add.
    assert marginal("2") == pytest.approx([(40 + 210) / 1953] * 4, rel=1e-5)
    # layer 3, first input: nothing below one input, but layer 2 would not run at all: 70; the second: 130 / 2 more.
    # Layer 2 with two outputs and three inputs: (60 + 200) / 2 = 130, so 60 more than with one.
    assert marginal("3") == pytest.approx([70 / 1953, 60 / 1953], rel=1e-5)


def test_a_margin_is_a_part_of_the_saving_not_counted_on() -> None:
    model = masked_chain([1.0, 0.5, 0.25, -1.0], [1.0, -1.0])
    budget = MacBudget(model, X, cost=LatencyCost(chain_table(), margin=0.25))
    assert budget.dense_cost == 1953
    assert budget.ratio().item() == pytest.approx((1650 + 0.25 * (1953 - 1650)) / 1953, abs=1e-12)
    budget.ratio().backward()
    kept = masked_layers(model)["3"].prune_mask
    assert (kept.grad / ste_derivative(kept.detach())).flatten().tolist() == pytest.approx(
        [0.75 * 70 / 1953, 0.75 * 60 / 1953], rel=1e-5
    )
    with pytest.raises(ValueError, match="margin"):
        LatencyCost(chain_table(), margin=1.0)


def test_a_layer_that_computes_nothing_takes_no_time() -> None:
    cost = LatencyCost(chain_table(), margin=0)
    cost.bind(MacBudget(mask_model(chain()), X), chain())
    row = torch.tensor([1])
    zero, two = torch.zeros(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
    assert cost.layers(row, two, zero).item() == 0
    assert cost.layers(row, two, two).item() == 60 - 7  # all outputs: no scatter


def test_a_table_of_another_network_or_size_is_refused(tmp_path: Path) -> None:
    model = mask_model(chain())
    with pytest.raises(ValueError, match=r"does not fit layer '0'.*measure again"):
        MacBudget(model, torch.zeros(1, 3, 6, 6), cost=LatencyCost(chain_table(), margin=0))
    file = tmp_path / "table.json"
    file.write_text(json.dumps(chain_table()), encoding="utf-8")
    MacBudget(model, X, cost=make_cost(dict(type="latency", table=str(file))))
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"table\.json is no latency table"):
        LatencyCost(str(file))


def test_costs_by_name() -> None:
    assert make_cost("macs") is None
    assert isinstance(make_cost("params"), ParameterCost)
    for wrong in ("time", dict(type="latency"), dict(type="params", table="x")):
        with pytest.raises(ValueError, match="cost must be"):
            make_cost(wrong)


def test_parameters_equal_those_of_the_slimmed_network() -> None:
    for seed in range(6):
        model = mask_model(Block(), linear=True)
        randomize_masks(model, 0.5, torch.Generator().manual_seed(seed))
        x = torch.zeros(1, 3, 4, 4)
        budget = MacBudget(model, x, cost=ParameterCost())
        small, _ = slim_with_plan(model, x, budget)
        dense, kept = parameter_counts(model, budget)
        assert budget.dense_cost == dense == sum(p.numel() for p in Block().parameters())
        assert budget.kept_cost() == kept == sum(p.numel() for p in small.parameters())


def test_masks_on_single_weights_take_no_parameters_out() -> None:
    model = mask_model(chain(), granularity="weight")
    randomize_masks(model, 0.5)
    budget = MacBudget(model, X, cost=ParameterCost())
    assert budget.kept_cost() == budget.dense_cost == 4 * 27 + 4 + 8 + 2 + 4 + 2


def test_parameter_gradient_by_hand() -> None:
    model = masked_chain([1.0] * 4, [1.0, 1.0])
    budget = MacBudget(model, X, cost=ParameterCost())
    budget.ratio().backward()
    assert budget.dense_cost == 4 * 27 + 4 + 8 + 2 + 4 + 2
    first, second = (layer.prune_mask.grad for layer in masked_layers(model).values())
    slope = ste_derivative(torch.ones(1)).item()
    # an input of layer 2: its 2 weights, and layer 0's 27 weights and bias
    assert (first / slope).flatten().tolist() == pytest.approx([(2 + 28) / 128] * 4, rel=1e-5)
    # an input of layer 3: its 2 weights, and layer 2's 4 weights and bias
    assert (second / slope).flatten().tolist() == pytest.approx([(2 + 5) / 128] * 2, rel=1e-5)


CHAIN_BUDGET = MacBudget(masked_chain([1.0] * 4, [1.0] * 2), X, cost=LatencyCost(chain_table(), margin=0))
SMOOTH = chain_table()
SMOOTH["layers"]["2"].update(gather=0.0, scatter=0.0)
SMOOTH_BUDGET = MacBudget(masked_chain([1.0] * 4, [1.0] * 2), X, cost=LatencyCost(SMOOTH, margin=0))
PATTERN = st.lists(st.booleans(), min_size=6, max_size=6)


@given(PATTERN, st.integers(0, 5))
def test_more_channels_never_cost_less(pattern: list[bool], index: int) -> None:
    less = torch.tensor(pattern)
    less[0] = less[4] = True
    more = less.clone()
    more[index] = True
    assert SMOOTH_BUDGET.cost_of(more) >= SMOOTH_BUDGET.cost_of(less)


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6), st.floats(0.7, 0.99), st.booleans())
def test_the_freeze_ends_at_or_under_the_target(masks: list[float], target: float, fill: bool) -> None:
    for name, values in CHAIN_BUDGET.split(torch.tensor(masks)).items():
        dict(CHAIN_BUDGET.masked)[name].prune_mask.data.copy_(values)
    result = project(CHAIN_BUDGET, target, fill)
    assert CHAIN_BUDGET.cost_of(result.pattern) <= target * CHAIN_BUDGET.dense_cost
    assert result.ratio == CHAIN_BUDGET.cost_of(result.pattern) / CHAIN_BUDGET.dense_cost


def test_a_frozen_network_costs_what_was_promised() -> None:
    model = mask_model(Block())
    budget = MacBudget(model, torch.zeros(1, 3, 4, 4), cost=ParameterCost())
    randomize_masks(model, 0.9)
    freeze_masks(model, budget.split(project(budget, 0.6).pattern))
    small, _ = slim_with_plan(copy.deepcopy(model), torch.zeros(1, 3, 4, 4))
    assert sum(p.numel() for p in small.parameters()) <= 0.6 * budget.dense_cost


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize(("kind", "kernel"), [(nn.Conv2d, 3), (nn.ConvTranspose2d, 2)])
def test_the_parameters_of_grouped_layers_are_counted(kind: type[nn.Module], kernel: int, groups: int) -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 16, kernel, groups=groups), nn.Conv2d(16, 4, 1)))
    x = torch.zeros(1, 3, 5, 5)
    budget = MacBudget(net, x, cost=ParameterCost())
    assert budget.dense_cost == (24 + 8) + (8 * 16 // groups * kernel**2 + 16) + (64 + 4)
    for seed in range(4):
        randomize_masks(net, 0.4, torch.Generator().manual_seed(seed))
        small, _ = slim_with_plan(net, x, budget)
        assert sum(p.numel() for p in small.parameters()) == budget.kept_cost() < budget.dense_cost
    # one live channel of the last layer: its group stays, as many inputs as it reads, and one output of it
    masked_layers(net)["2"].prune_mask.data[1:] = -1.0
    masked_layers(net)["2"].prune_mask.data[0] = 1.0
    small, _ = slim_with_plan(net, x, budget)
    assert sum(p.numel() for p in small.parameters()) == budget.kept_cost()


def test_the_parameters_of_two_groups_by_hand() -> None:
    """3 -> 8 -> 8 in two groups of four -> 2; a dead group loses its weights and its biases."""
    net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1)))
    budget = MacBudget(net, torch.zeros(1, 3, 1, 1), cost=ParameterCost())
    assert budget.dense_cost == 32 + (8 * 4 + 8) + 18
    masked_layers(net)["2"].prune_mask.data[4:] = -1.0
    assert budget.kept_cost() == 16 + (4 * 4 + 4) + 10


def test_a_budget_takes_costs_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    budget = MacBudget(net, torch.randn(1, 3, 5, 5), cost="params")
    assert (budget.what, budget.dense_cost) == ("parameters", 3 * 8 + 8 + 8 * 4 + 4)
    assert MacBudget(net, torch.randn(1, 3, 5, 5), cost="macs").unit == "MACs"
    with pytest.raises(ValueError, match="cost must be 'macs', 'params' or"):
        MacBudget(net, torch.randn(1, 3, 5, 5), cost="flops")
