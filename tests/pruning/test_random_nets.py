"""Random nets under random masks: slimmed equals masked, its MACs the budget's, the gradient the true saving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmitp.pruning import (
    MacBudget,
    freeze_masks,
    mask_model,
    masked_layers,
    project,
    randomize_masks,
    share_masks,
)
from mmitp.pruning import divisor as divisors
from mmitp.pruning.divisor import divisor_of
from mmitp.pruning.freeze import lowest_ratio, require_reachable
from mmitp.pruning.layers import ChannelPad, kind_of
from mmitp.pruning.slim import plan_slim

SETTINGS = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


class RandomNet(nn.Module):
    """A straight-line program over feature maps ``values``: each step takes some of them and appends new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.program: list[tuple[Callable[..., Any], list[int], list[int]]] = []  # step, layers, operands
        self.outputs: list[int] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for step, layers, operands in self.program:
            result = step(*[self.layers[i] for i in layers], *[values[i] for i in operands])
            values.extend(result if isinstance(result, (list, tuple)) else [result])
        return [values[i] for i in self.outputs]


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def squeeze_excite(down: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(up(F.relu(down(F.adaptive_avg_pool2d(x, 1)))))


def spatial_gate(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.sigmoid(layer(x)) * x


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)


def split(x: Tensor) -> tuple[Tensor, ...]:
    return x.split([1, x.shape[1] - 1], 1)


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x += y
    return x.relu_()


def cat(*x: Tensor) -> Tensor:
    return torch.cat(x, 1)


def flat(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(torch.flatten(F.adaptive_max_pool2d(x, 2), 1))


@st.composite
def nets(draw: Callable[..., Any], reuse: bool = True) -> RandomNet:
    """Nets of one stem and up to a dozen steps; ``reuse``: layers may run several times."""
    net = RandomNet()
    shapes: list[tuple[int, int]] = [(3, 8)]

    def add(
        step: Callable[..., Any], operands: list[int], *made: tuple[int, int], new: Any = (), old: Any = ()
    ) -> None:
        first = len(net.layers)
        net.layers.extend(new)
        net.program.append((step, [*range(first, len(net.layers)), *old], operands))
        shapes.extend(made)

    def conv(i: int, o: int) -> nn.Conv2d:
        k = draw(st.sampled_from([1, 3]))
        return nn.Conv2d(i, o, k, padding=k // 2, bias=draw(st.booleans()))

    width = st.integers(1, 6)
    c = draw(st.integers(2, 6))
    add(apply, [0], (c, 8), new=[conv(3, c)])
    kinds = "conv conv conv grouped depthwise norm act add add cat shuffle split pool up gate se mean pad".split()
    for _ in range(draw(st.integers(3, 14))):
        kind = draw(st.sampled_from(kinds + ["reuse"] * reuse))
        at = draw(st.integers(max(1, len(shapes) - 3), len(shapes) - 1))  # mostly what is not read yet
        c, size = shapes[at]
        if kind == "conv":
            add(apply, [at], (o := draw(width), size), new=[conv(c, o)])
        elif kind == "grouped" and c % 2 == 0:
            o = 2 * draw(st.integers(1, 3))
            add(apply, [at], (o, size), new=[nn.Conv2d(c, o, 3, padding=1, groups=2)])
        elif kind == "depthwise":
            add(apply, [at], (c, size), new=[nn.Conv2d(c, c, 3, padding=1, groups=c)])
        elif kind == "norm":
            add(apply, [at], (c, size), new=[draw(st.sampled_from([nn.BatchNorm2d, nn.PReLU]))(c)])
        elif kind == "act":
            add(draw(st.sampled_from([F.relu, torch.sigmoid, F.hardswish])), [at], (c, size))
        elif kind in ("add", "cat"):
            same = [i for i in range(1, len(shapes)) if shapes[i][1] == size and (kind == "cat" or shapes[i][0] == c)]
            other = draw(st.sampled_from(same))
            if kind == "add":
                add(draw(st.sampled_from([torch.add, torch.mul, add_in_place])), [at, other], (c, size))
            else:
                add(cat, [at, other], (c + shapes[other][0], size))
        elif kind == "shuffle" and c % 2 == 0:
            add(shuffle, [at], (c, size))
        elif kind == "split" and c > 1:
            add(split, [at], (1, size), (c - 1, size))
        elif kind == "pool" and size > 2:
            add(lambda x: F.max_pool2d(x, 2), [at], (c, size // 2))
        elif kind == "up" and size < 8:
            add(apply, [at], (o := draw(width), 2 * size), new=[nn.ConvTranspose2d(c, o, 2, 2)])
        elif kind == "gate":
            add(spatial_gate, [at], (c, size), new=[conv(c, 1)])
        elif kind == "se":
            add(squeeze_excite, [at], (c, size), new=[nn.Conv2d(c, 2, 1), nn.Conv2d(2, c, 1)])
        elif kind == "mean":
            add(lambda x: x - x.mean(1, keepdim=True), [at], (c, size))
        elif kind == "pad":
            new = draw(st.integers(1, 3))
            pad = ChannelPad(c, c + new, front=draw(st.integers(0, new)))
            add(apply, [at], (c + new, size), new=[pad])
        elif kind == "reuse":
            known = [
                (i, layer)
                for i, layer in enumerate(net.layers)
                if isinstance(layer, nn.Conv2d) and layer.in_channels == c and layer.stride == (1, 1)
            ]
            if known:
                i, layer = draw(st.sampled_from(known))
                add(apply, [at], (layer.out_channels, size), old=[i])
    last = len(shapes) - 1
    c, size = shapes[last]
    end = draw(st.sampled_from(["conv", "linear", "both"]))
    if end != "linear":
        add(apply, [last], (3, size), new=[conv(c, 3)])
        net.outputs.append(len(shapes) - 1)
    if end != "conv":
        add(flat, [last], (0, 0), new=[nn.Linear(4 * c, 3)])
        net.outputs.append(len(shapes) - 1)
    if draw(st.booleans()):
        add(apply, [at := draw(st.integers(1, last))], (2, shapes[at][1]), new=[conv(shapes[at][0], 2)])
        net.outputs.append(len(shapes) - 1)
    return net


@SETTINGS
@given(nets(), st.floats(0, 1), st.booleans(), st.booleans())
def test_slimmed_equals_masked_and_costs_the_budget(
    prove: Callable[..., MacBudget], net: RandomNet, keep: float, linear: bool, share: bool
) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if not any(isinstance(m, nn.Conv2d) and m.groups == 1 for m in list(net.layers)[1:]):
        net.layers.append(nn.Conv2d(8, 8, 1))  # never run: something to mask all the same
    prove(net, x, keeps=(keep,), linear=linear, share=share)


@SETTINGS
@given(nets(reuse=False), st.floats(0.1, 0.9))
def test_gradient_is_the_saving_of_each_channel_alone(net: RandomNet, keep: float) -> None:
    """The MACs are linear in each single mask entry, so their derivative is the difference between on and off."""
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask_model(net, linear=True)
    budget = MacBudget(net, x)
    if not budget.n_entries:
        return
    randomize_masks(net, keep, torch.Generator().manual_seed(0))
    pattern = budget.flat_pattern()
    saving = []
    for i in range(len(pattern)):
        with_it, without = pattern.clone(), pattern.clone()
        with_it[i], without[i] = True, False
        saving.append(budget.macs_of(with_it) - budget.macs_of(without))
    budget.ratio().backward()
    gradient = torch.cat([layer.prune_mask.grad for _, layer in budget.masked])  # type: ignore[misc]
    masks = budget.flat_masks().detach()
    ste = 0.5 * (1 - torch.tanh(masks) ** 2)
    torch.testing.assert_close(
        gradient / ste * budget.dense_macs, torch.tensor(saving, dtype=torch.float), rtol=1e-4, atol=1e-2
    )


@SETTINGS
@given(nets(), st.floats(0, 1))
def test_switching_a_channel_off_never_costs_operations(net: RandomNet, keep: float) -> None:
    mask_model(net, linear=True)
    budget = MacBudget(net, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), check=False)
    if not budget.n_entries:
        return
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(budget.n_entries, generator=generator) < keep
    macs = budget.macs_of(pattern)
    for i in torch.randperm(len(pattern), generator=generator)[:20].tolist():
        fewer = pattern.clone()
        fewer[i] = False
        assert budget.macs_of(fewer) <= macs
    assert 0 <= macs <= budget.dense_macs
    assert budget.macs_of(torch.ones_like(pattern)) == budget.dense_macs


@pytest.fixture
def narrow_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nets are narrow: ``'auto'`` means 2 from four channels on, and 4 from eight."""
    monkeypatch.setattr(divisors, "CHOICES", 2)


@SETTINGS
@given(
    nets(),
    st.booleans(),
    st.integers(1, 4) | st.just("auto"),
    st.sampled_from([0.0, 0.3]),
    st.one_of(st.just(0.0), st.floats(0, 1)),
    st.integers(0, 1000),
    st.booleans(),
)
def test_what_the_start_accepts_the_freeze_meets_in_multiples_of_the_divisor(
    narrow_choice: None,
    net: RandomNet,
    share: bool,
    divisor: int | str,
    min_keep: float,
    slack: float,
    seed: int,
    fill: bool,
) -> None:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask_model(net, linear=True)
    if share:
        share_masks(net, x)
    budget = MacBudget(net, x, check=False)
    if not budget.n_entries:
        return
    randomize_masks(net, 0.6, torch.Generator().manual_seed(seed))
    low = lowest_ratio(budget, divisor, min_keep)
    target = max(low * (1 - slack) + slack, low)
    require_reachable(budget, target, divisor, min_keep)
    result = project(budget, target, fill, divisor, min_keep)
    assert result.ratio == budget.macs_of(result.pattern) / budget.dense_macs <= target
    freeze_masks(net, budget.split(result.pattern))
    dense = {name: kind.channels(m) for name, m in net.named_modules() if (kind := kind_of(m)) is not None}
    counted = {record.name for i, record in enumerate(budget.layers) if i not in budget.needs.dead}
    for name, cut in plan_slim(net, budget).layers.items():
        if name in counted:
            for kept, full in zip((len(cut.in_keep), len(cut.out_keep)), dense[name], strict=True):
                groups = getattr(net.get_submodule(name), "groups", 1)
                step = int(divisor_of(torch.tensor(full), divisor))
                assert kept % step == 0 or kept == full or groups > 1


def test_the_generator_makes_nets_that_shrink() -> None:
    """The random nets are no empty proof: half of a seeded sample can lose more than half of its operations."""
    ratios = []

    @settings(max_examples=20, deadline=None, database=None, derandomize=True)
    @given(nets())
    def sample(net: RandomNet) -> None:
        if any(isinstance(m, nn.Conv2d) and m.groups == 1 for m in list(net.layers)[1:]):
            mask_model(net, linear=True)
            assert masked_layers(net)
            ratios.append(MacBudget(net, torch.randn(1, 3, 8, 8)).min_ratio())

    sample()
    assert sorted(ratios)[len(ratios) // 2] < 0.5
