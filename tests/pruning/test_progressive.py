"""Progressive slimming in the core: losses, ratio and states over a cut, what stays in reach, and resume in between."""

import copy

import pytest
import torch
from torch import nn

from mmitp.pruning import InTrainPruner, MacBudget, fold_masks, mask_model, masked_layers, project, share_masks
from mmitp.pruning.check import counted_macs
from mmitp.pruning.cost import ParameterCost
from mmitp.pruning.divisor import Divisor
from mmitp.pruning.live import shrink_live
from mmitp.pruning.progressive import OffTimes, entries_to_keep, note_cut, plan_cut
from mmitp.pruning.slim_layers import SlimConv2d, SlimLayer

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    """A residual block, a depthwise convolution and a concatenation: gathers, scatters, groups."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.a, self.norm_a = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.b, self.norm_b = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.side = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.c = nn.Conv2d(2 * width, 8, 1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = (x + self.norm_b(self.b(self.norm_a(self.a(x)).relu()))).relu()
        return self.c(torch.cat([y, self.side(x)], 1)).mean((2, 3))


def masked(seed=0, width=16):
    torch.manual_seed(seed)
    model = mask_model(Net(width), example_inputs=X.float()).double()
    for layer in masked_layers(model).values():
        layer.prune_mask.data = layer.prune_mask.data.float()
    return model


def switch_off(model, part, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in masked_layers(model).values():
        n = layer.prune_mask.numel()
        layer.prune_mask.data[torch.randperm(n, generator=generator)[: int(part * n)]] = -0.2


def cut(model, budget, optimizer=None, keep=None):
    keep = entries_to_keep(budget, ~budget.flat_pattern(), 0.3) if keep is None else keep
    plan, whole = plan_cut(model, budget, (X,), keep)
    shrink_live(model, plan, optimizer, keep_masks=True)
    note_cut(model, budget, keep, whole)


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_training_over_two_cuts_goes_on_as_under_the_masks(make):
    """Masks stand still: the cut network trains on what the masked one would."""
    runs = []
    for cuts in (False, True):
        model, generator = masked(), torch.Generator().manual_seed(0)
        for layer in masked_layers(model).values():
            layer.prune_mask.data = torch.rand(layer.prune_mask.shape, generator=generator)
        weights = [p for n, p in model.named_parameters() if not n.endswith("prune_mask")]
        masks = [p for n, p in model.named_parameters() if n.endswith("prune_mask")]
        groups = [dict(params=weights), dict(params=masks, lr=0.0)]
        if make == "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        else:
            optimizer = torch.optim.Adam(groups, lr=0.01)
        budget, losses, figures = MacBudget(model, X), [], []
        for _ in range(2):
            losses += train(model, optimizer, 2)
            for layer in masked_layers(model).values():
                layer.prune_mask.data -= 0.25  # the lowest go off
            figures.append((budget.kept_macs(), budget.ratio().item()))
            if cuts:
                cut(model, budget, optimizer)
                assert (budget.kept_macs(), budget.ratio().item()) == figures[-1]
        losses += train(model, optimizer, 4)
        runs.append((losses, figures, model, budget, optimizer))
    (expected, _, plain, _, _), (losses, _, small, budget, optimizer) = runs
    assert losses == pytest.approx(expected, rel=1e-10)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in plain.parameters())
    for p in small.parameters():
        for value in optimizer.state[p].values():
            assert not isinstance(value, torch.Tensor) or value.numel() == 1 or value.shape == p.shape
    assert budget.dense_macs == counted_macs(Net().double(), X)


def test_a_network_that_was_cut_is_slimmed_to_the_budgets_macs_and_outputs():
    model = masked()
    budget = MacBudget(model, X)
    for seed in (1, 2, 3):
        switch_off(model, 0.2, seed)
        cut(model, budget)
    switch_off(model, 0.2, 4)
    pruner = InTrainPruner(model, X, 0.5, b=1.0, budget=budget)
    small = pruner.slim()
    torch.testing.assert_close(small.eval()(X), model.eval()(X), rtol=1e-10, atol=1e-12)
    assert counted_macs(small, X) == budget.kept_macs()
    assert pruner.report().params_kept == sum(p.numel() for p in small.parameters())
    assert pruner.report().params_dense == sum(p.numel() for p in Net().parameters())
    assert not any("prune" in name or "index" in name for name, _ in small.named_parameters())


def test_layers_whose_masks_are_tied_are_cut_together():
    model = mask_model(Net(), example_inputs=X.float())
    assert share_masks(model, X.float()) == [["a", "c"]]
    budget = MacBudget(model, X.float())
    model.a.prune_mask.data[:5] = model.c.prune_mask.data[:5] = -1
    budget.require_tied()
    before = model.eval()(X.float()).detach()
    keep = entries_to_keep(budget, ~budget.flat_pattern(), 0.3)
    plan, whole = plan_cut(model, budget, (X.float(),), keep)
    shrink_live(model, plan, keep_masks=True)
    note_cut(model, budget, keep, whole)
    torch.testing.assert_close(model(X.float()), before)
    assert (len(model.a.prune_mask), len(model.c.prune_mask)) == (11, 32 - 5)
    assert torch.equal(model.a.mask_ties, model.c.mask_ties[:11])


@pytest.mark.parametrize(("divisor", "min_keep"), [(4, 0.0), (8, 0.3), (1, 0.5)])
def test_a_cut_leaves_multiples_of_the_divisor_the_floors_and_the_target_in_reach(divisor, min_keep):
    for seed in range(2):
        model = masked(seed)
        budget = MacBudget(model, X)
        for step in range(3):
            switch_off(model, 0.3, 10 * seed + step)
            for layer in masked_layers(model).values():  # as the pruner keeps its floors
                least = layer.prune_mask.topk(int(min_keep * 16) + 1).indices
                layer.prune_mask.data[least] = layer.prune_mask.data[least].abs()
            idle = ~budget.flat_pattern()
            cut(model, budget, keep=entries_to_keep(budget, idle, 0.6, divisor, min_keep))
            if divisor > 1:
                counts = Divisor(budget, divisor).counts(torch.ones(budget.n_entries, dtype=torch.bool))
                short_in, short_out = Divisor(budget, divisor).missing(counts)
                assert not bool(short_in.any() or short_out.any())
            assert all(layer.prune_mask.numel() >= min_keep * 16 for layer in masked_layers(model).values())
            found = project(budget, 0.6, fill=True, divisor=divisor, min_keep=min_keep)
            assert found.ratio <= 0.6


def test_a_budget_of_parameters_stays_exact_over_a_cut():
    model = masked()
    budget = MacBudget(model, X, cost=ParameterCost())
    dense = sum(p.numel() for p in Net().parameters())
    for seed in (1, 2):
        switch_off(model, 0.3, seed)
        kept = budget.kept_cost()
        cut(model, budget, keep=entries_to_keep(budget, ~budget.flat_pattern(), 0.4))
        assert (budget.dense_cost, budget.kept_cost()) == (dense, kept)
    small = InTrainPruner(model, X, 0.4, b=1.0, budget=budget).slim()
    assert sum(p.numel() for p in small.parameters()) == kept


def test_nothing_is_cut_where_the_target_would_get_out_of_reach():
    """Two readers of one stream of 4 channels that keep one each: 2 channels are computed if they are not the same."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.a(x) + self.b(x)

    model = mask_model(Two())
    x = X.float()
    budget = MacBudget(model, x)
    assert budget.dense_macs == 4 * 64 * (3 * 4 + 16 + 16)
    model.a.prune_mask.data = torch.tensor([1.0, -1, -1, -1])
    model.b.prune_mask.data = torch.tensor([-1.0, -1, -1, 1])
    idle = ~budget.flat_pattern()
    # One channel for both: 3 + 4 + 4 = 11 of 44. One each, not the same: 3 * 2 + 4 + 4 = 14 of 44.
    assert bool(entries_to_keep(budget, idle, 11 / 44).all())
    assert torch.equal(entries_to_keep(budget, idle, 14 / 44), ~idle)


def test_off_times_count_steps_without_a_break():
    off = OffTimes()
    for pattern in ([1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]):
        off.observe(torch.tensor(pattern, dtype=torch.bool))
    assert off.steps.tolist() == [2, 4, 2]
    off.keep(torch.tensor([True, False, True]))
    again = OffTimes()
    again.load_state_dict(off.state_dict(), torch.device("cpu"))
    assert again.steps.tolist() == [2, 2]


# -- in the pruner


def step(model, optimizer, seed):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def start(slim_every=8, width=16, **kwargs):
    model = masked(width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    pruner = InTrainPruner(model, X, 0.4, steps=40, slim_every=slim_every, **kwargs)
    pruner.attach(optimizer)
    pruner.active = True
    return model, optimizer, pruner


def test_a_window_with_cuts_ends_at_the_target_with_a_smaller_network_on_the_way():
    model, optimizer, pruner = start(width=32)  # of 16 channels one may cost more than the 1 % that are allowed
    gone = []
    for i in range(40):
        step(model, optimizer, i)
        before = pruner.ratio()
        gone.append(pruner.cut(optimizer))
        assert pruner.ratio() == before
        assert pruner.budget.n_entries == len(pruner.budget.flat_masks())
    cuts = [i + 1 for i, n in enumerate(gone) if n]
    assert len(cuts) >= 3
    assert all(i % 8 == 0 for i in cuts)
    assert sum(gone) >= 20
    report = pruner.freeze()
    assert 0.39 <= report.ratio <= 0.4
    pruner.slim(optimizer)
    assert counted_macs(model, X) == report.macs_kept
    assert sum(p.numel() for p in model.parameters()) == report.params_kept
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_only_what_was_off_in_each_of_the_last_steps_goes():
    model, optimizer, pruner = start(b=0.0)
    for i in range(10):
        model.a.prune_mask.data[:3] = -0.5
        model.a.prune_mask.data[3] = 0.5 if i == 5 else -0.5
        step(model, optimizer, i)
    assert pruner.cut(optimizer) == 3
    assert len(model.a.prune_mask) == 13
    assert pruner.cut(optimizer) == 0  # the next 10 steps are not over


@pytest.mark.parametrize("at", [16, 27])
def test_a_run_resumed_in_the_window_after_a_cut_goes_on_exactly(at):
    def run(model, optimizer, pruner, steps):
        losses = []
        for i in steps:
            losses.append(step(model, optimizer, i))
            pruner.cut(optimizer)
        return losses

    model, optimizer, pruner = start()
    run(model, optimizer, pruner, range(at))
    saved = copy.deepcopy([pruner.state_dict(), model.state_dict(), optimizer.state_dict()])
    expected = run(model, optimizer, pruner, range(at, 40))
    assert pruner.budget.cut is not None

    again, other, resumed = start()
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    assert run(again, other, resumed, range(at, 40)) == expected
    assert resumed.freeze() == pruner.freeze()


def test_a_graph_that_is_still_alive_stops_the_cut_and_nothing_has_changed():
    model, optimizer, pruner = start(b=0.0)
    for i in range(10):
        model.a.prune_mask.data[:3] = -0.5
        step(model, optimizer, i)
    loss = model(X).mean()
    with pytest.raises(ValueError, match="still alive"):
        pruner.cut(optimizer)
    assert (len(model.a.prune_mask), pruner.budget.cut) == (16, None)
    del loss


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_slim_every_is_a_number_of_steps(value):
    with pytest.raises(ValueError, match="positive number of optimizer steps"):
        start(slim_every=value)


def test_cutting_without_slim_every_is_refused():
    *_, pruner = start(slim_every=None)
    with pytest.raises(ValueError, match="slim_every=steps"):
        pruner.cut()


def test_a_network_that_was_cut_folds_its_masks_and_keeps_its_gathers():
    model = masked()
    budget = MacBudget(model, X)
    switch_off(model, 0.4, 1)
    cut(model, budget)
    switch_off(model, 0.2, 2)
    expected = model.eval()(X)
    assert fold_masks(model) is model
    assert not masked_layers(model)
    assert isinstance(model.a, SlimConv2d)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_a_network_that_was_cut_is_saved_whole(tmp_path):
    model = masked()
    budget = MacBudget(model, X)
    switch_off(model, 0.4, 1)
    cut(model, budget)
    assert any(isinstance(layer, SlimLayer) for layer in masked_layers(model).values())
    torch.save(model, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))
