"""What makes no attack is refused, by every attack and on every device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmitp.attacks import check_arguments, check_pixels, fgsm_rs, grad_align, n_fgsm, pgd

GOOD: dict[str, Any] = {"eps": 0.1, "alpha": 0.1}
WRONG = [
    pytest.param({"eps": -0.1}, "eps must be finite and must not be negative, got -0.1", id="eps negative"),
    pytest.param({"eps": math.nan}, "eps must be finite", id="eps nan"),
    pytest.param({"eps": math.inf}, "eps must be finite", id="eps infinite"),
    pytest.param({"eps": "8"}, "eps must be a number", id="eps a string"),
    pytest.param({"eps": True}, "eps must be a number", id="eps a truth value"),
    pytest.param({"alpha": 0.0}, "alpha, the length of a step, must be positive", id="alpha zero"),
    pytest.param({"alpha": -1}, "alpha must be finite and must not be negative", id="alpha negative"),
    pytest.param({"alpha": math.nan}, "alpha must be finite", id="alpha nan"),
    pytest.param({"low": 1.0, "high": 0.0}, "low <= high, got low=1, high=0", id="box upside down"),
    pytest.param({"low": math.nan}, "low=nan", id="low nan"),
    pytest.param({"high": math.nan}, "high=nan", id="high nan"),
    pytest.param({"low": math.inf, "high": math.inf}, "low=inf", id="nothing in the box"),
]
PGD_WRONG = [
    pytest.param({"steps": -1}, "steps must be a whole number, at least 0", id="steps negative"),
    pytest.param({"steps": 2.5}, "steps must be a whole number", id="steps a fraction"),
    pytest.param({"restarts": 0}, "restarts must be a whole number, at least 1", id="no run"),
    pytest.param({"restarts": 2, "random_start": False}, "repeat one run", id="the same run twice"),
    pytest.param({"norm": "l1"}, "norm must be one of", id="unknown norm"),
]


def loss(v: Tensor) -> Tensor:
    return v.flatten(1).sum(1)


X = torch.full((2, 3), 0.5)
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm_rs": lambda **kw: fgsm_rs(loss, X, **{**GOOD, **kw}),
    "n_fgsm": lambda **kw: n_fgsm(loss, X, **{**GOOD, **kw}),
    "pgd": lambda **kw: pgd(loss, X, **{**GOOD, "steps": 1, **kw}),
}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_every_attack_refuses_what_makes_none(attack: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS[attack](**wrong)


@pytest.mark.parametrize("attack", sorted(ATTACKS))
@pytest.mark.parametrize("name", ["eps", "alpha", "high"])
def test_one_wrong_value_of_a_tensor_is_enough(attack: str, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ATTACKS[attack](**{name: torch.tensor([0.5, math.nan, 0.5])})


@pytest.mark.parametrize(("wrong", "message"), PGD_WRONG)
def test_pgd_refuses_wrong_counts_and_norms(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS["pgd"](**wrong)


def test_noise_is_checked_too() -> None:
    for noise in (-1.0, math.nan):
        with pytest.raises(ValueError, match="noise must be finite"):
            ATTACKS["n_fgsm"](noise=noise)
    with pytest.raises(ValueError, match="eps must be finite"):
        grad_align(loss, X, eps=math.nan)


def test_what_is_an_attack_passes() -> None:
    check_arguments(eps=0, alpha=0)  # no threat: nothing has to move
    check_arguments(eps=0.1, alpha=0, steps=0)
    check_arguments(eps=torch.tensor([0.1, 0.0]), alpha=torch.tensor([0.1, 0.0]))  # padding has no threat
    check_arguments(eps=0.1, alpha=0.1, low=-math.inf, high=math.inf)
    check_arguments(eps=0.1, alpha=0.1, low=torch.zeros(1, 3, 1, 1), high=1)
    with pytest.raises(ValueError, match=r"alpha=\[0.1.*, 0.0\] with eps=0.1"):
        check_arguments(eps=0.1, alpha=torch.tensor([0.1, 0.0]))


def test_a_checked_caller_may_skip_the_check_and_then_no_value_is_read() -> None:
    """On the meta device a tensor has no values: reading one, as a check has to, is an error."""
    x, amount = torch.zeros(2, 3, device="meta"), torch.zeros(3, device="meta")
    box: dict[str, Any] = {"low": amount, "high": amount, "check": False}
    for attacked in (
        fgsm_rs(loss, x, eps=amount, alpha=amount, **box),
        n_fgsm(loss, x, eps=amount, alpha=amount, **box),
        pgd(loss, x, eps=amount, alpha=amount, steps=2, norm="l2", **box),
    ):
        assert attacked.shape == x.shape
    with pytest.raises((NotImplementedError, RuntimeError)):
        fgsm_rs(loss, x, eps=amount, alpha=amount)


@pytest.mark.parametrize(
    ("sizes", "doubt"),
    [
        ({"eps": 0.03, "alpha": 0.04}, "eps=7.65"),
        ({"eps": 8 / 255}, "it is eps=8"),
        ({"eps": 0.5, "norm": "l2"}, "eps=127.5"),
        ({"eps": 8, "alpha": 10 / 255}, "it is alpha=10"),
        ({"eps": 8, "alpha": 2 / 255, "steps": 20}, "20 steps of it go less than a tenth of the way to eps=8"),
    ],
)
def test_a_size_on_another_scale_is_doubted_once(sizes: dict[str, Any], doubt: str) -> None:
    (found,) = check_pixels(**sizes)
    assert doubt in found


@pytest.mark.parametrize(
    "sizes",
    [
        {"eps": 8, "alpha": 10},
        {"eps": 0.5, "alpha": 0.125, "steps": 20},
        {"eps": 0, "alpha": 0},
        {"eps": 255},
        {"eps": 127.5, "norm": "l2", "alpha": 30},
        {"eps": 765, "norm": "l2"},
    ],
)
def test_published_sizes_raise_no_doubt(sizes: dict[str, Any]) -> None:
    assert check_pixels(**sizes) == []


@pytest.mark.parametrize("sizes", [{"eps": 300}, {"eps": 8, "alpha": 256}, {"eps": math.nan}, {"eps": -1}])
def test_sizes_that_no_image_has_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"eps|alpha"):
        check_pixels(**sizes)
