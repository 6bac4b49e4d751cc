"""The comparison of two networks' outputs, kind by kind, and what surrounds it."""

from __future__ import annotations

from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmitp.pruning import MacBudget, fold_norms, mask_model, masked_layers, randomize_masks, slim
from mmitp.pruning.verify import (
    compare,
    copy_of,
    difference,
    doubled,
    eval_mode,
    frozen_at,
    outputs,
    relative_gap,
    values_in,
)

inf, nan = float("inf"), float("nan")


def between(a: Any, b: Any, rtol: float = 1e-4) -> str:
    return compare(dict(values_in(a)), dict(values_in(b)), rtol)


@dataclass
class Result:
    boxes: Tensor
    scores: list[Tensor]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([True, False]),
        torch.tensor([1, 2**60], dtype=torch.int64),
        torch.tensor([-inf, 2.0, inf]),
        torch.tensor([nan, 1.0]),
        torch.tensor([nan, nan]),
        torch.tensor([1 + 2j, complex(inf, nan)]),
        torch.empty(0, 4),
        torch.zeros(3),
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.float16),
        np.array([1.0, nan]),
        3,
        dict(a=[torch.ones(2), (None, "text", 2.5)], b=Result(torch.ones(1, 4), [torch.zeros(2)])),
    ],
    ids=str,
)
def test_the_same_is_the_same(value: Any) -> None:
    assert between(value, value) == ""


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        (torch.tensor([True, False]), torch.tensor([True, True]), "output differs in 1 of 2 values"),
        (torch.tensor([2**60]), torch.tensor([2**60 + 1]), "output differs in 1 of 1 values"),
        (torch.tensor([1.0, -inf]), torch.tensor([1.0, inf]), "output has infinite values or NaN in other places"),
        (torch.tensor([1.0, nan]), torch.tensor([nan, 1.0]), "output has infinite values or NaN in other places"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, nan]), "output has infinite values or NaN in other places"),
        (torch.tensor([inf, 2.0]), torch.tensor([inf, 2.1]), "output differs by 0.1 at a scale of 2"),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2.5j]), "output differs by 0.5 at a scale of 2"),
        (torch.ones(2), torch.ones(2, 1), "output has shape (2, 1) instead of (2,)"),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), "output has type torch.int64 instead of torch.float32"),
        (torch.ones(2).bool(), torch.ones(2).int(), "output has type torch.int32 instead of torch.bool"),
        (dict(a=torch.ones(1)), dict(b=torch.ones(1)), "output['a'] is missing"),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)], "output[1] is none of the model's"),
        (dict(a=[torch.ones(1), None]), dict(a=[torch.ones(1), 1]), "output['a'][1] is none of the model's"),
        (Result(torch.ones(1), []), Result(torch.zeros(1), []), "output.boxes differs by 1 at a scale of 1"),
        ((1.0, 2), (1.0, 3), "output[1] differs in 1 of 1 values"),
        ("text", "text", "the model gives no tensor and no number that could be compared"),
    ],
)
def test_what_differs_is_named(a: Any, b: Any, problem: str) -> None:
    assert between(a, b) == problem


def test_the_tolerance_is_a_part_of_the_largest_finite_value() -> None:
    a = torch.tensor([100.0, 0.0, inf])
    assert between(a, torch.tensor([100.0, 0.009, inf])) == ""
    assert between(a, torch.tensor([100.0, 0.011, inf])) == "output differs by 0.011 at a scale of 100"
    assert relative_gap(a, torch.tensor([100.0, 0.5, inf])) == pytest.approx(0.005)
    assert relative_gap(a, torch.tensor([100.0, nan, inf])) == inf
    assert relative_gap(torch.empty(0), torch.empty(0)) == 0


class Net(nn.Module):
    """A body under masks, and outputs of a given form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        )
        self.form = form
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        y = self.body(x + torch.randn_like(x) if self.form == "noise" else x)
        if self.form == "bool":
            return dict(logits=y, valid=torch.ones(2, 6, 6, dtype=torch.bool))
        if self.form == "infinite":
            return y.masked_fill(torch.tensor([False, True, False]).view(1, 3, 1, 1), -inf)
        if self.form == "nan":
            return y, torch.full((1,), nan)
        if self.form == "complex":
            return torch.fft.fft(y)
        return y


@pytest.mark.parametrize("form", ["bool", "infinite", "nan", "complex", "noise"])
def test_networks_with_such_outputs_are_slimmed_and_folded(form: str) -> None:
    net, x = mask_model(Net(form).eval()), torch.randn(2, 3, 6, 6)
    budget = MacBudget(net, x)
    randomize_masks(net, 0.5, torch.Generator().manual_seed(0))
    small = slim(net, x, budget)
    assert small.body[0].out_channels < 8
    assert difference(net, small, x) == ""
    assert difference(net, fold_norms(small, x), x, rtol=1e-5) == ""
    with torch.no_grad():
        small.body[4].bias[0] += 1
    assert "differs" in difference(net, small, x)


def test_the_imaginary_part_counts() -> None:
    net = Net("complex").eval()
    other = Net("complex").eval()
    other.load_state_dict(net.state_dict())

    class Imaginary(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return torch.complex(y.real, 2 * y.imag)

    x = torch.randn(2, 3, 6, 6)
    assert difference(net, other, x) == ""
    assert "differs" in difference(net, nn.Sequential(other, Imaginary()), x)


def test_any_error_of_the_other_network_is_a_difference_and_one_of_the_model_an_error() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 3, "three channels"
            return x

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise TypeError("broken")

    x = torch.randn(1, 3, 2, 2)
    assert difference(Strict(), Broken(), x) == "TypeError: broken"
    with pytest.raises(TypeError):
        difference(Broken(), Strict(), x)


def test_outputs_are_copies_and_leave_every_mode_as_it_was() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2).eval()
            self.register_buffer("out", torch.zeros(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return self.out.add_(self.norm(x))

    net = Buffered().train()
    net.norm.eval()
    x = torch.ones(3, 2)
    first, second = outputs(net, x), outputs(net, x)
    assert compare(first, second, 1e-4).startswith("output differs by 1 ")
    assert net.training
    assert not net.norm.training
    with pytest.raises(KeyError), eval_mode(net):
        raise KeyError
    assert net.training


def test_masks_frozen_for_a_while_come_back_as_they_were() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)))
    one, two = masked_layers(net).values()
    two.freeze_mask(torch.tensor([1.0, 0, 0, 1]))
    with torch.no_grad():
        one.prune_mask.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with suppress(KeyError), frozen_at({one: torch.tensor([0, 1, 1, 1]), two: torch.tensor([1, 1, 0, 0])}):
        assert one.binary_mask().tolist() == [0, 1, 1, 1]
        assert two.binary_mask().tolist() == [1, 1, 0, 0]
        raise KeyError
    assert (one.mask_frozen, two.mask_frozen) == (False, True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_doubling_keeps_containers() -> None:
    Pair = namedtuple("Pair", "a b")
    out = doubled(dict(x=Pair(torch.ones(1), [torch.ones(1, dtype=torch.int64)])))
    assert isinstance(out["x"], Pair)
    assert (out["x"].a.dtype, out["x"].b[0].dtype) == (torch.float64, torch.int64)


class Wrapping(nn.Module):
    """Keeps functions that close over its own layers, a stranger, themselves and a name without a value."""

    def __init__(self, stranger: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 2)
        inner, forward = self.inner, self.outer.forward

        def count(n: int) -> int:
            return n and 1 + count(n - 1)

        def twice(x: Tensor, *, times: int = 2) -> Tensor:
            return times * forward(x) + count(3)

        self.outer.forward = lambda x: twice(x) + inner(x) + stranger(x)  # type: ignore[method-assign]
        self.outer.register_forward_hook(lambda module, args, out: out * inner.weight.sum())
        self.empty = lambda: nothing
        if not inner:
            nothing = None

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


def test_functions_that_a_copied_module_keeps_work_on_the_copy() -> None:
    torch.manual_seed(0)
    stranger = nn.Linear(2, 2)
    model, x = Wrapping(stranger), torch.randn(3, 2)
    copied = copy_of(model)
    before = model(x)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), before)
    copied(x).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert stranger.weight.grad is not None  # it is none of the model's and stays what it was
    with pytest.raises(NameError):
        copied.empty()
