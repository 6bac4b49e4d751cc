"""The push of Optimizer 2: distances, forecasts, and the closed loop of ``b='auto'``."""

import math

import pytest
import torch
from torch import nn

from mmitp.pruning import MacBudget, mask_model, masked_layers, project
from mmitp.pruning.pressure import AutoPressure, Forecast, balanced, distance, path, push_speed


def chain(*widths, size=4):
    """3x3 convolutions of the given widths on size x size images, masked; and their budget."""
    net = nn.Sequential(*[nn.Conv2d(a, b, 3, padding=1) for a, b in zip((3, *widths), (*widths, 2), strict=True)])
    mask_model(net)
    return net, MacBudget(net, torch.zeros(1, 3, size, size))


def gradient(budget):
    masks = [layer.prune_mask for _, layer in budget.masked]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(budget.ratio(), masks)])


def test_distance_is_the_mask_that_would_have_to_go_last():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    mask_model(net)
    budget = MacBudget(net, torch.zeros(1, 3, 1, 1))  # each of 4 channels costs 3 + 2 of 20
    net[1].prune_mask.data.copy_(torch.tensor([0.9, 0.2, 0.7, 0.5]))
    assert distance(budget, 1.0) == 0
    assert distance(budget, 0.75) == pytest.approx(0.2)
    assert distance(budget, 0.5) == pytest.approx(0.5)
    assert distance(budget, 0.49) == pytest.approx(0.7)


def test_path_is_a_half_cosine_from_one_to_the_target():
    assert path(-1, 0.4) == path(0, 0.4) == 1
    assert path(0.5, 0.4) == pytest.approx(0.7)
    assert path(1, 0.4) == path(7, 0.4) == 0.4


def test_a_forecast_extrapolates_what_it_sees():
    forecast = Forecast()
    for step in range(0, 50, 10):
        forecast.observe(step, 1.0 - 0.01 * step)
    assert forecast.speed == pytest.approx(0.01)
    assert forecast.arrival() == pytest.approx(100)
    # 0.6 left, 24 steps: 0.025 a step wanted, 0.015 missing, at 0.003 a unit of b.
    assert forecast.needed_push(b=10, lr=0.01, speed_of_push=0.3, steps=64) == pytest.approx(10 + 0.015 / 0.003)


def test_masks_that_do_not_move_never_arrive():
    forecast = Forecast()
    for step in range(5):
        forecast.observe(step, 1.0)
    assert forecast.arrival() == math.inf
    forecast.observe(5, 0.0)
    assert forecast.arrival() == 5


def test_push_speed_is_the_mean_gradient_of_those_next_to_go():
    net, budget = chain(4)
    net[1].prune_mask.data.copy_(torch.tensor([0.1, 0.2, 0.3, -1.0]))
    grad = torch.tensor([1.0, 3.0, 50.0, 7.0])
    assert push_speed(budget, grad, reach=0.2) == 2.0


def test_balanced_pushes_every_layer_by_the_part_it_still_keeps():
    net, budget = chain(8, 16, 4)
    layers = list(masked_layers(net).values())
    layers[1].prune_mask.data[:12] = -1.0
    push = budget.split(balanced(budget, gradient(budget)))
    kept = [layer.binary_mask() > 0 for layer in layers]
    means = [float(g[k].mean()) for g, k in zip(push.values(), kept, strict=True)]
    assert means == pytest.approx([1.0, 0.25, 1.0])


def run(net, budget, target, steps, task=0.0, seed=0):
    """The closed loop alone; the task lifts most masks, each at a pace of its own, with noise of the same size.

    Returns the loop and the ratio after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    useful = {
        layer: 1 + torch.randn(layer.prune_mask.shape, generator=generator) for layer in masked_layers(net).values()
    }
    auto = AutoPressure(target, lr=0.01, steps=steps)
    ratios = []
    for step in range(steps):
        push = balanced(budget, gradient(budget))
        auto.update(budget, push, step, 1)
        with torch.no_grad():
            for layer in masked_layers(net).values():
                noise = torch.randn(layer.prune_mask.shape, generator=generator)
                layer.prune_mask += task * (useful[layer] + noise)
            b = auto.restrain(budget, push, auto.b, step) if auto.b > 0 else 0.0
            for layer, g in zip(masked_layers(net).values(), budget.split(push).values(), strict=True):
                layer.prune_mask -= auto.lr * b * g
        ratios.append(float(budget.ratio().detach()))
    return auto, ratios


@pytest.mark.parametrize("target", [0.7, 0.5, 0.2])
@pytest.mark.parametrize("task", [0.001, 0.01])
def test_auto_follows_its_path_and_arrives(target, task):
    net, budget = chain(24, 32, 24, 16)
    auto, ratios = run(net, budget, target, 200, task)
    # A channel of this net costs up to 2 % of it, and the marginal ones come and go.
    assert target - 0.08 < ratios[-1] <= target + 0.02
    worst = max(abs(r - path((i + 1) / auto.arrival, target)) for i, r in enumerate(ratios[: int(auto.arrival)]))
    assert worst < 0.12


def test_auto_does_not_empty_layers_that_cost_more():
    """A quarter of the image size a layer later: the plain gradient would take all of the first before the second."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.MaxPool2d(4),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
    )
    mask_model(net)
    budget = MacBudget(net, torch.zeros(1, 3, 16, 16))
    run(net, budget, 0.5, 200, task=0.01)
    assert min(row.in_kept / row.in_channels for row in budget.table()[1:]) > 0.25


def test_masks_that_travel_as_one_front_do_not_cross_all_at_once():
    net, budget = chain(32)
    with torch.no_grad():
        net[1].prune_mask += 1e-4 * torch.arange(32)
    _, ratios = run(net, budget, 0.5, 100)
    assert 0.45 <= ratios[-1] <= 0.5


def test_masks_that_nothing_tells_apart_are_left_to_the_freeze():
    net, budget = chain(24, 32, 24)
    _, ratios = run(net, budget, 0.5, 100)
    assert min(ratios) >= 0.45
    assert project(budget, 0.5).ratio > 0.45


def test_its_state_survives_a_checkpoint():
    net, budget = chain(24, 32)
    auto, _ = run(net, budget, 0.5, 60, task=0.01)
    again = AutoPressure(0.5, lr=0.01, steps=60)
    again.load_state_dict(auto.state_dict())
    push = balanced(budget, gradient(budget))
    assert again.update(budget, push, 60, 1) == auto.update(budget, push, 60, 1)
