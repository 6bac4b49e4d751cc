"""The push of Optimizer 2: distances, forecasts, and the closed loop of ``b='auto'``."""

import math

import pytest
import torch
from torch import nn

from mmitp.pruning import InTrainPruner, MacBudget, mask_model, masked_layers
from mmitp.pruning.freeze import _switched, floors
from mmitp.pruning.pressure import (
    HYSTERESIS,
    Forecast,
    PathFollower,
    Significance,
    balanced,
    distance,
    path,
    push_speed,
)


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


class Tree(nn.Module):
    """Two blocks and a root over both outputs, as in DLA: the last block's output is read by the root alone."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.root = nn.Conv2d(2 * width, width, 1)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        first = torch.relu(self.first(self.stem(x)))
        last = torch.relu(self.last(first) + first)
        return self.out(torch.relu(self.root(torch.cat([last, first], 1))))


def tree(width):
    net = mask_model(Tree(width))
    return net, MacBudget(net, torch.zeros(1, 3, 4, 4))


def test_balanced_pushes_each_tensor_of_a_concatenation_by_the_part_that_is_kept_of_it():
    net, budget = tree(4)
    net.root.prune_mask.data[0] = -1.0
    costs, push = (
        budget.split(g)["root"] for g in (budget.marginal_costs(), balanced(budget, budget.marginal_costs()))
    )
    # Multiply-accumulates at a place, of 4 * (27 + 36 + 36 + 8 + 2): the root's 4 outputs, and of the last block a 3x3
    # convolution's output. The first block's output is needed by the last block in any case.
    assert (costs * 436).tolist() == pytest.approx([4 + 36, 40, 40, 40, 4, 4, 4, 4])
    assert push[1:4].tolist() == pytest.approx([0.75] * 3)  # three of four are kept
    assert push[4:].tolist() == pytest.approx([1.0] * 4)


def test_auto_keeps_as_much_of_the_last_block_as_of_the_first():
    net, budget = tree(32)
    generator = torch.Generator().manual_seed(0)
    for layer in masked_layers(net).values():
        layer.prune_mask.data.uniform_(0.9, 1.1, generator=generator)
    run(net, budget, 0.5, 100)
    last, first = (net.root.prune_mask > 0).view(2, 32).float().mean(1).tolist()
    assert abs(last - first) < 0.2
    assert min(last, first) > 0.4


def run(net, budget, target, steps, task=0.0, decay=0.0, drift=1.0, seed=0):
    """The path alone; the task lifts most masks, each at a pace of its own, with noise of the same size.

    Returns the follower, and the ratio and the pattern after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    useful = {
        layer: drift * (1 + torch.randn(layer.prune_mask.shape, generator=generator))
        for layer in masked_layers(net).values()
    }
    follower, floor = PathFollower(target, steps), floors(budget, 0.1)
    ratios, patterns = [], []
    for step in range(steps):
        push = balanced(budget, budget.marginal_costs())
        with torch.no_grad():
            for layer in masked_layers(net).values():
                noise = torch.randn(layer.prune_mask.shape, generator=generator)
                layer.prune_mask += task * (useful[layer] + noise) - decay
        follower.hold(budget, push, step, floor)
        ratios.append(float(budget.ratio().detach()))
        patterns.append(budget.flat_pattern())
    return follower, ratios, patterns


def by_fisher(squares, target, **kwargs):
    """A chain of 8 and 4 channels whose masks have these mean squares of ``dL_task/dM_b``, pruned by ``'fisher'``."""
    net, budget = chain(8, 4)
    x = torch.zeros(1, 3, 4, 4)
    pruner = InTrainPruner(net, x, target, steps=1, push="fisher", budget=budget, min_keep=0, fill=False, **kwargs)
    pruner.significance.mean_square = torch.tensor(squares)
    return net, pruner


def test_fisher_takes_the_masks_that_hold_the_least_loss_a_mac():
    # A place costs 9 * (3 * 8 + 8 * 4 + 4 * 2) = 576: of the eight channels each 9 * (3 + 4), of the four 9 * (8 + 2).
    # 5 over 10 goes first, 4 over 7 second; then 576 - 9 * 10 - 9 * (3 + 3) = 432 are left.
    squares = [4.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 5.0, 90.0, 90.0, 90.0]
    net, pruner = by_fisher(squares, target=0.75)
    for step in range(pruner.steps):
        pruner.position = step
        pruner._look(step)
    assert (net[2].prune_mask > 0).tolist() == [False, True, True, True]
    assert (net[1].prune_mask > 0).tolist() == [False] + [True] * 7
    assert pruner.ratio() == 0.75


def test_fisher_orders_the_freeze_too():
    """The masks' own values are the same everywhere: where the divisor drops and takes back, the loss a MAC decides."""
    squares = [1.0, 9.0, 1.0, 9.0, 1.0, 9.0, 9.0, 1.0, 1.0, 9.0, 9.0, 1.0]
    net, pruner = by_fisher(squares, target=0.5, divisor=2)
    report = pruner.freeze()
    assert report.ratio <= 0.5
    assert net[1].binary_mask().tolist() == [0, 1, 0, 1, 0, 1, 1, 0]


def test_fisher_is_an_order_for_auto():
    net, budget = chain(4)
    with pytest.raises(ValueError, match="push='fisher' is an order in which masks go"):
        InTrainPruner(net, torch.zeros(1, 3, 4, 4), 0.5, b=10, push="fisher", budget=budget)


def cheapest_channel(budget):
    """The largest part of the cost that one more channel adds to the present pattern."""
    on = budget.flat_pattern()
    costs = [budget.cost_of(_switched(on, torch.tensor([i]), True)) for i in (~on).nonzero().flatten()]
    return (max(costs) - budget.cost_of(on)) / budget.dense_cost


@pytest.mark.parametrize("target", [0.9, 0.7, 0.5, 0.2])
@pytest.mark.parametrize("task", [0.0, 0.001, 0.01])
def test_auto_follows_its_path_and_ends_at_the_target(target, task):
    net, budget = chain(24, 32, 24, 16)
    one_off = [torch.arange(budget.n_entries) != i for i in range(budget.n_entries)]
    most = 1 - min(budget.macs_of(on) for on in one_off) / budget.dense_macs
    follower, ratios, _ = run(net, budget, target, 200, task)
    channel = cheapest_channel(budget)
    assert target - max(0.01 * target, channel) <= ratios[-1] <= target
    for step, ratio in enumerate(ratios):
        assert ratio <= follower.wanted(step)
    if task < 0.01:  # the task alone drops nothing
        assert min(r - follower.wanted(i) for i, r in enumerate(ratios)) > -most


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("task", [0.0, 0.3])
def test_windows_of_a_few_steps_end_at_the_target_too(steps, task):
    net, budget = chain(24, 32, 24, 16)
    _, ratios, _ = run(net, budget, 0.5, steps, task)
    assert 0.5 - cheapest_channel(budget) <= ratios[-1] <= 0.5


def test_what_weight_decay_takes_below_the_target_comes_back():
    net, budget = chain(24, 32, 24, 16)
    _, ratios, _ = run(net, budget, 0.5, 200, task=0.001, decay=0.02)  # all masks would be below zero in 50 steps
    assert 0.5 - max(0.005, cheapest_channel(budget)) <= ratios[-1] <= 0.5


def test_masks_do_not_chatter_once_the_target_is_reached():
    net, budget = chain(24, 32, 24, 16)
    follower, _, patterns = run(net, budget, 0.5, 200, task=0.001, drift=0.0)
    after = patterns[int(follower.arrival) + 1 :]
    changes = sum(int((a != b).sum()) for a, b in zip(after, after[1:], strict=False))
    assert changes <= 0.1 * len(after)


def test_a_mask_that_its_gradients_bring_back_competes_with_the_others():
    """It returns with what the push had taken, so the lowest of the others goes in its place."""
    net, budget = chain(4)
    mask = net[1].prune_mask
    with torch.no_grad():
        mask.copy_(torch.tensor([0.8, 1.0, 1.2, 1.4]))
    push, floor, follower = torch.ones(4), floors(budget, 0.0), PathFollower(0.75, 1)
    follower.hold(budget, push, 0, floor)
    assert net[1].binary_mask().tolist() == [0, 1, 1, 1]
    assert mask[0].item() == pytest.approx(-HYSTERESIS)
    with torch.no_grad():
        mask[0] += 0.04
    follower.hold(budget, push, 1, floor)
    assert net[1].binary_mask().tolist() == [0, 1, 1, 1]  # not far enough
    with torch.no_grad():
        mask[0] += 0.31  # at 0.3 now, and with the 0.8 that the push took at 1.1
    follower.hold(budget, push, 2, floor)
    assert net[1].binary_mask().tolist() == [1, 0, 1, 1]
    assert mask[0].item() == pytest.approx(1.1)


def test_what_the_loss_depends_on_goes_last():
    net, budget = chain(4)
    worth = torch.tensor([1.0, 0.5, 2.0, 1.0])
    PathFollower(0.75, 1).hold(budget, torch.ones(4), 0, floors(budget, 0.0), worth)
    assert net[1].binary_mask().tolist() == [1, 0, 1, 1]


def test_significance_is_the_root_mean_square_of_the_gradient_to_the_binary_mask():
    net, budget = chain(4)
    net[1].prune_mask.data.copy_(torch.tensor([1.0, 0.2, -0.5, 1.0]))
    slope = torch.tensor([0.5 * (1 - math.tanh(m) ** 2) for m in (1.0, 0.2, -0.5, 1.0)])
    significance = Significance()
    for sign in (1, -1, 1, -1):  # averages out, its square does not
        significance.observe(budget, sign * slope * torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert significance.relative(budget).tolist() == pytest.approx([2 / 3, 4 / 3, 2.0, 0.1])


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
    run(net, budget, 0.5, 200, task=0.001)
    assert min(row.in_kept / row.in_channels for row in budget.table()[1:]) > 0.25


def test_its_state_survives_a_checkpoint():
    net, budget = chain(24, 32)
    follower, *_ = run(net, budget, 0.5, 60, task=0.01)
    again = PathFollower(0.5, 60)
    again.load_state_dict(follower.state_dict(), torch.device("cpu"))
    assert again.push == follower.push
    assert torch.equal(again.on, follower.on)
