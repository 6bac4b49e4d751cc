"""Vanishing and fabrication on a heat map."""

from __future__ import annotations

import math

import pytest
import torch

from mmitp.attacks import fabrication, fgsm_rs, vanishing


def test_fabrication_is_the_cross_entropy_against_no_object_summed_over_levels() -> None:
    """softplus(0) = log 2 at each of 1 * 2 * 2 and 1 * 1 * 1 positions."""
    levels = [torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 1, 1)]
    torch.testing.assert_close(fabrication(levels), torch.full((3,), 5 * math.log(2)))
    torch.testing.assert_close(vanishing(levels[0]), torch.full((3,), -4 * math.log(2)))


def test_vanishing_pulls_at_peaks_not_at_the_background() -> None:
    logits = torch.tensor([[[[4.0, -6.0]]]], requires_grad=True)
    (grad,) = torch.autograd.grad(vanishing(logits).sum(), logits)
    torch.testing.assert_close(grad, -torch.sigmoid(logits.detach()))


def test_attacks_lower_and_raise_the_scores() -> None:
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 2, 3, padding=1)
    x = torch.rand(2, 3, 8, 8)
    clean = net(x).sigmoid().mean((1, 2, 3))
    gone = fgsm_rs(lambda v: vanishing(net(v)), x, eps=0.1, alpha=0.2)
    made = fgsm_rs(lambda v: fabrication(net(v)), x, eps=0.1, alpha=0.2)
    assert (net(gone).sigmoid().mean((1, 2, 3)) < clean).all()
    assert (net(made).sigmoid().mean((1, 2, 3)) > clean).all()


def test_no_levels_is_an_error() -> None:
    with pytest.raises(ValueError, match="no score map"):
        fabrication([])
