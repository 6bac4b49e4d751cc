"""A check of the whole chain on any model: random masks, frozen, slimmed, compared and counted independently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .budget import MacBudget
from .freeze import freeze_masks
from .products import ProductCounter, unfused
from .rng import kept_rng
from .slim import slim_with_plan
from .verify import call_model, copied, copy_of, difference, doubled, eval_mode, tensors_in


@dataclass
class SlimCheck:
    """Outcome of :func:`check_slimming`.

    Attributes:
        ratio: operations kept by the random pattern.
        macs_budget: MACs by the budget.
        macs_counted: MACs of the slimmed model by the operators that torch runs.
        problem: how the outputs differ; empty if they are equal.
        in_double: compared in float64, where rounding does not turn the order of proposals around.
    """

    ratio: float
    macs_budget: int
    macs_counted: int
    problem: str
    in_double: bool = False

    @property
    def passed(self) -> bool:
        return not self.problem and self.macs_budget == self.macs_counted


def counted_macs(model: nn.Module, example_inputs: Any) -> int:
    """MACs of one evaluation pass by the operators that torch runs: convolutions and products with a weight.

    Independent of the budget, which goes by the formulas of layers. Products of two activations (attention's) are left
    out here too (see :mod:`mmitp.pruning.products`).
    """
    inputs = copied(example_inputs)
    with eval_mode(model), kept_rng(), torch.no_grad(), unfused():
        with ProductCounter(tensors_in(inputs)) as counter:
            call_model(model, inputs)
    return sum(product.macs for product in counter.products)


@torch.no_grad()
def randomize_to(budget: MacBudget, target: float, seed: int = 0) -> float:
    """Switches masks off at random until about ``target`` of the operations are left; returns the ratio reached.

    Where the cheapest ratio is above the target, the middle between it and 1 is taken.
    """
    target = max(target, (1 + budget.min_ratio()) / 2) if budget.min_ratio() > target else target
    order = torch.rand(budget.n_entries, generator=torch.Generator().manual_seed(seed))
    low, high = 0.0, 1.0
    for _ in range(20):
        keep = (low + high) / 2
        over = budget.macs_of(budget.binarize(keep - order)) > target * budget.dense_macs
        low, high = (low, keep) if over else (keep, high)
    for name, values in budget.split(low - order).items():
        mask = dict(budget.masked)[name].prune_mask
        mask.copy_(values)
    return budget.kept_macs() / budget.dense_macs


def check_slimming(
    model: nn.Module, example_inputs: Any, target: float = 0.5, rtol: float = 1e-5, more_examples: Sequence[Any] = ()
) -> SlimCheck:
    """Random masks to about ``target``, freeze, slim, and compare: outputs to ``rtol``, MACs as integers.

    Outputs are compared on ``more_examples`` too, inputs of other sizes or batches. Changes the model's masks. The
    budget is recorded anew under the frozen masks: where work depends on the data (proposals), a network with other
    masks has other work.
    """
    examples = (example_inputs, *more_examples)
    randomize_to(MacBudget(model, example_inputs, more_examples=more_examples), target)
    freeze_masks(model)
    outcome = _compare(model, examples, rtol, in_double=False)
    if outcome.passed:
        return outcome
    try:
        in_double = _compare(copy_of(model).double(), [doubled(e) for e in examples], rtol, in_double=True)
    except RuntimeError:
        return outcome  # not every model runs in float64
    return in_double if in_double.passed else outcome


def _compare(model: nn.Module, examples: Sequence[Any], rtol: float, in_double: bool) -> SlimCheck:
    first, *more = examples
    budget = MacBudget(model, first, more_examples=more)
    small, _ = slim_with_plan(model, first, budget, more)
    macs, counted = budget.kept_macs(), counted_macs(small, first)
    problem = next(filter(None, (difference(model, small, example, rtol) for example in examples)), "")
    return SlimCheck(macs / budget.dense_macs, macs, counted, problem, in_double)
