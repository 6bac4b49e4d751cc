"""The table measured with a clock that counts MACs: it must find exactly them, for networks it has not seen too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmitp.pruning import MacBudget, mask_model, masked_layers, randomize_masks
from mmitp.pruning.latency import LatencyCost, clock_ratio, fit, measure, measure_latency, time_in_turn, timing


class Net(nn.Module):
    """A residual stream (gathers and scatters), a depthwise layer, a module that runs twice, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.b(self.depthwise(self.a(x)).relu())
        x = self.down(self.down(x))
        return self.fc(self.up(x).mean((2, 3)))


def counted(calls: Sequence[Callable[[], Any]], clock: Any, rounds: int) -> torch.Tensor:
    times = []
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        times.append(counter.get_total_flops() / 2)
    return torch.tensor([times], dtype=torch.float64)


@pytest.fixture
def macs_as_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "times_in_turn", counted)


@pytest.mark.usefixtures("macs_as_time")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_clock_of_macs_gives_a_table_of_macs(batch: int) -> None:
    model, x = mask_model(Net(), linear=True), torch.randn(batch, 3, 8, 8)
    randomize_masks(model, 0.5)
    table = dict(measure_latency(model, x), batch=batch)
    assert table["fit"]["scale"] == pytest.approx(1.0, rel=1e-9)
    assert all(n["predicted"] == pytest.approx(n["measured"], rel=1e-9) for n in table["networks"])
    assert [n["fitted"] for n in table["networks"]] == [True] * 6 + [False] * 2
    # stated for one image, as PruneHook does, the budget takes a batch's table too
    budget = MacBudget(model, x[:1], cost=LatencyCost(table, margin=0))
    for seed in range(4):
        randomize_masks(model, 0.5, torch.Generator().manual_seed(seed))
        assert budget.cost.total(budget.tables(x.device), budget.flat_pattern().double()) == pytest.approx(
            batch * budget.kept_macs(), rel=1e-9
        )
    assert budget.dense_cost == pytest.approx(batch * budget.dense_macs, abs=1)


@pytest.mark.usefixtures("macs_as_time")
def test_the_measured_model_is_left_alone_and_its_table_can_be_checked() -> None:
    model, x = mask_model(Net()), torch.randn(1, 3, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    threads = torch.get_num_threads()
    table = measure_latency(model, x, threads=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    budget = MacBudget(model, x, cost=LatencyCost(table, margin=0))
    half = budget.binarize(torch.rand(budget.n_entries) - 0.5)
    assert time_in_turn(model, x, budget, [half]).tolist() == [[pytest.approx(budget.cost_of(half), abs=1)]]
    part = budget.macs_of(half) / budget.dense_macs
    assert clock_ratio(model, x, budget, half) == pytest.approx(part, rel=1e-9) == budget.cost.by_table(half)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(layer.mask_frozen for layer in masked_layers(model).values())
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="no mask that counts"):
        measure_latency(Net(), x)


def test_points_are_where_pruning_ends_not_where_kernels_are_fastest() -> None:
    assert measure._points(1) == (1,)
    assert measure._points(3) == (1, 2, 3)
    assert measure._points(64) == (1, 7, 14, 29, 45, 61, 64)


def test_the_least_time_is_taken_and_fast_calls_are_repeated() -> None:
    now = 0
    spent = iter([0] * 100)

    def clock() -> int:
        return now

    def call() -> None:
        nonlocal now
        now += 100_000 + next(spent, 0)

    assert timing.least_times([call], clock, 3) == [100_000.0]
    slow = iter([10**6, 5, 7, 9, 1, 3, 2, 4])

    def noisy() -> None:
        nonlocal now
        now += 400_000 + next(slow)

    # The first call warms up, the second tells how often to repeat. Then three rounds of a call that brings caches up
    # and a timed one: 9, 3 and 4 more than 400,000.
    assert timing.least_times([noisy], clock, 3) == [400_003.0]


def test_a_ratio_is_the_median_of_neighbouring_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mask_model(Net()), torch.randn(1, 3, 8, 8)
    cut = dict(inputs=[1], outputs=[1], ns=[[1.0]], gather=0, scatter=0, element=0, n_in=1, n_out=1, pair_macs=1)
    table = dict(format=1, constant=1.0, layers=dict(any=cut), threads=1)
    budget = MacBudget(model, x)
    budget.cost = LatencyCost(table)
    # a quiet moment that one of them caught, a slow one that hit both, an ordinary one: 0.2, 0.8 and 0.75
    rows = torch.tensor([[100.0, 20.0], [1000.0, 800.0], [100.0, 75.0]], dtype=torch.float64)
    monkeypatch.setattr(timing, "times_in_turn", lambda calls, clock, rounds: rows)
    assert clock_ratio(model, x, budget, budget.flat_pattern()) == pytest.approx(0.75)


def test_remainders_are_never_negative() -> None:
    a = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    assert fit._nonnegative(a, a @ torch.tensor([2.0, 3.0], dtype=torch.float64)).tolist() == pytest.approx([2, 3])
    # 2 x - 1 would fit; without a negative constant the best slope is (1 + 6 + 15) / 14
    assert fit._nonnegative(a, torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)).tolist() == pytest.approx(
        [22 / 14, 0]
    )


def test_functions_and_attention_are_measured_with_the_rest() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.w = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(8, 1, 3, 3))
            self.att, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(self.b(F.relu(self.a(x))), self.w, padding=1, groups=8)
            t = y.flatten(2).transpose(1, 2)
            return self.fc(self.att(t, t, t, need_weights=False)[0])

    model, x = mask_model(Net()), torch.zeros(1, 3, 16, 16)
    table = measure_latency(model, x, rounds=2, networks=3)
    assert list(table["layers"]) == ["a", "b", "fc"]
    budget = MacBudget(model, x, cost=LatencyCost(table, margin=0))
    assert budget.dense_cost > 0
    assert budget.ratio().item() == pytest.approx(1, abs=1e-3)


def test_the_clock_waits_for_any_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(torch.xpu, "synchronize", lambda: waits.append(1))
    clock = timing.clock_of(torch.device("xpu"))
    first = clock()
    assert clock() > first
    assert len(waits) == 2
    with pytest.raises(ValueError, match="nothing can be timed on meta"):
        timing.clock_of(torch.device("meta"))
