"""Shared proof: a masked model, its budget and its slimmed copy agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from mmitp.pruning import (
    MacBudget,
    SlimPlan,
    apply_plan,
    fold_masks,
    mask_model,
    masked_layers,
    randomize_masks,
    share_masks,
    without_gathers,
)
from mmitp.pruning.slim import slim_with_plan
from mmitp.pruning.slim_layers import SlimLayer
from mmitp.pruning.verify import call_model, tensors_in

aten = torch.ops.aten
#: what the budget counts of plain layers; products of two activations (attention) are none of it
COUNTED = (aten.convolution, aten._convolution, aten.addmm, aten.mm)


def counted_macs(model: nn.Module, inputs: Any) -> int:
    """MACs of convolutions and linear layers by torch's own counter."""
    model.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation that the counter does not know
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call_model(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return sum(counter.get_flop_counts()["Global"].get(op, 0) for op in COUNTED) // 2


def unsettle(model: nn.Module, seed: int = 0) -> None:
    """Gives parameters and running statistics values at which nothing is 0 or 1 by chance."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> None:
        like.data.copy_(torch.rand(like.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            draw(module.weight, 0.5, 1.5)
            draw(module.bias, -0.5, 0.5)
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            draw(module.running_mean, -0.3, 0.3)
            draw(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.PReLU):
            draw(module.weight, 0.1, 0.4)


def relative_gap(a: Any, b: Any) -> float:
    """Largest difference of two models' outputs, relative to the largest value of each tensor."""
    tensors_a, tensors_b = list(tensors_in(a)), list(tensors_in(b))
    assert [t.shape for t in tensors_a] == [t.shape for t in tensors_b]
    gaps = [
        float((s.double() - t.double()).abs().max() / s.double().abs().max().clamp(min=1e-6))
        for s, t in zip(tensors_a, tensors_b, strict=True)
        if s.numel()
    ]
    return max(gaps)


def prove(
    model: nn.Module,
    inputs: Any,
    keeps: tuple[float, ...] = (0.7, 0.3),
    share: bool = False,
    extra: int = 0,
    **options: Any,
) -> MacBudget:
    """Masks ``model`` and proves: MACs dense and slimmed by torch's counter, outputs equal, rebuilt from the spec.

    ``extra``: MACs of products that torch's counter cannot tell from those of two activations.
    """
    unsettle(model)
    model.eval()
    dense = copy.deepcopy(model)
    assert mask_model(model, **options) is model
    if share:
        share_masks(model, inputs)
    budget = MacBudget(model, inputs)
    assert budget.dense_macs == counted_macs(dense, inputs) + extra
    assert budget.kept_macs() == budget.dense_macs
    assert budget.ratio().item() == 1.0
    for seed, keep in enumerate(keeps):
        randomize_masks(model, keep, torch.Generator().manual_seed(seed))
        small, plan = slim_with_plan(model, inputs, budget)
        assert not masked_layers(small)
        assert counted_macs(small, inputs) + extra == budget.kept_macs() == sum(row.macs_kept for row in budget.table())
        assert budget.ratio().item() == budget.kept_macs() / budget.dense_macs
        with torch.no_grad():
            expected = call_model(model, inputs)
            assert relative_gap(expected, call_model(small, inputs)) <= 1e-5
            rebuilt = apply_plan(copy.deepcopy(dense), SlimPlan.from_spec(plan.spec()))
            rebuilt.load_state_dict(small.state_dict())
            assert relative_gap(call_model(small, inputs), call_model(rebuilt.eval(), inputs)) == 0
            folded = copy.deepcopy(dense)
            folded.load_state_dict(fold_masks(copy.deepcopy(model)).state_dict())
            assert relative_gap(expected, call_model(folded, inputs)) <= 1e-5
        if seed == 0:
            whole = without_gathers(small, inputs)
            left = [m for m in whole.modules() if isinstance(m, SlimLayer) and not m.empty]
            assert not any(m.in_index is not None or m.out_index is not None for m in left)
            assert counted_macs(whole, inputs) + extra >= budget.kept_macs()
            with torch.no_grad():
                assert relative_gap(expected, call_model(whole, inputs)) <= 1e-5
    return budget


@pytest.fixture(name="prove")
def _prove() -> Callable[..., MacBudget]:
    return prove


@pytest.fixture(name="counted_macs")
def _counted_macs() -> Callable[[nn.Module, Any], int]:
    return counted_macs


@pytest.fixture(autouse=True)
def _seed_and_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in the way of layers this small
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
