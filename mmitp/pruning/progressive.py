"""Progressive slimming: channels that have been off for long are cut out of the network while its masks train (ours).

The masked network computes everything its masks drop, up to the freeze. Cutting what has been off for a while makes the
rest of the window cheaper. The losses go on as they were: what is cut was multiplied by zero (see
:mod:`~mmitp.pruning.live`). Masks, optimizer state, averages and the budget's flat vectors get shorter with the
network; the budget itself stays that of the dense one, and the ratio is the same before and after to the last digit.

What may not come back: a channel of a layer that was cut. Under a mask it could still have returned, by the gradient
that its weights keep getting. So only masks that were off at every one of the last steps go, and of these only as many
as leave every pattern within reach that a freeze may need: each layer its floor (``min_keep``), numbers of channels in
multiples of the divisor, and a network at or under the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmitp.values import unlike

from .budget import MacBudget
from .divisor import Divisor
from .freeze import cost_limit, floors, highest, lowest_ratio
from .layers import masked_layers
from .masks import MaskedLayer
from .slim import SlimPlan, checked, plan_of_dense


class OffTimes:
    """For how many steps every mask entry has been off without a break, flat; nothing here waits for the device."""

    def __init__(self) -> None:
        self.steps: Tensor | None = None

    def observe(self, on: Tensor) -> None:
        """Takes in the flat bool pattern after a step."""
        if self.steps is None:
            self.steps = torch.zeros_like(on, dtype=torch.long)
        self.steps = torch.where(on, 0, self.steps.to(on.device) + 1)

    def keep(self, keep: Tensor) -> None:
        """Forgets the entries not in ``keep`` (flat bool)."""
        if self.steps is not None:
            self.steps = self.steps[keep.to(self.steps.device)]

    def state_dict(self) -> dict[str, Any]:
        return dict(steps=None if self.steps is None else self.steps.cpu().clone())

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        steps = state["steps"]
        self.steps = None if steps is None else steps.to(device, copy=True)


def entries_to_keep(
    budget: MacBudget, idle: Tensor, target: float, divisor: int | str = 1, min_keep: float = 0.0
) -> Tensor:
    """The mask entries that stay when those that are ``idle`` are cut off: flat bool, on the CPU.

    Every layer keeps its floor, and reads and computes a multiple of the divisor (or all it had when it was dense). All
    stay where the freeze could not reach the target with the rest.

    Args:
        budget: the model's budget.
        idle: flat bool, entries that may go; none of them is on.
        target, divisor, min_keep: of the freeze (:func:`~mmitp.pruning.project`).
    """
    masks = budget.flat_masks().detach().cpu()
    keep = ~idle.cpu() | highest(budget, masks, floors(budget, min_keep))
    if divisor != 1:
        keep = Divisor(budget, divisor).up(masks, keep)
    small = budget.restricted(keep)
    if round(lowest_ratio(small, divisor, min_keep) * budget.dense_cost) > cost_limit(budget, target):
        return torch.ones_like(keep)
    return keep


def plan_cut(model: nn.Module, budget: MacBudget, examples: Sequence[Any], keep: Tensor) -> tuple[SlimPlan, bool]:
    """The plan that cuts a masked model down to some mask entries, checked on the examples, and whether its tensors
    keep their widths.

    Args:
        model: masked model; it may have been cut before.
        budget: its budget.
        examples: inputs of forward passes.
        keep: flat bool, from :func:`entries_to_keep`.

    Raises:
        RuntimeError: as :func:`~mmitp.pruning.slim`.
    """
    _, plan, whole_tensors = checked(model, budget, examples, keep)
    return plan, whole_tensors


def note_cut(model: nn.Module, budget: MacBudget, keep: Tensor, whole_tensors: bool) -> None:
    """Makes a budget that of the model which has been cut down to ``keep`` (:meth:`MacBudget.cut_off`)."""
    needed = budget.node_needs(keep)
    kept = budget.present if whole_tensors else budget.kept(needed)
    budget.cut_off(keep, plan_of_dense(model, budget, keep, kept), kept, whole_tensors)


def cut_state(budget: MacBudget) -> dict[str, Any] | None:
    """What a checkpoint has to know of a network that has been cut; None where it has not been."""
    if budget.cut is None:
        return None
    return dict(
        entries=budget.entries.clone(),
        present=budget.present.clone(),
        whole_tensors=budget.whole_tensors,
        spec=budget.cut.spec(),
        tied={r.name: budget.cut.layers[r.name].in_keep.clone() for r in budget.layers if _is_tied(r.module)},
    )


def _is_tied(layer: nn.Module | None) -> bool:
    return isinstance(layer, MaskedLayer) and layer.mask_ties is not None


def sizes_of_cut(model: nn.Module, state: Mapping[str, Any]) -> SlimPlan:
    """The plan that brings a dense model to a :func:`cut_state` where its budget is not known yet.

    It holds sizes, since the channels come with the state dict's values; but of tied masks the entries that stay, since
    no state dict says which of them are one.

    Args:
        model: dense masked model.
        state: from :func:`cut_state`; its ``spec`` may come from anywhere.

    Raises:
        ValueError: the state is of another network.
    """
    plan = SlimPlan.from_spec(state["spec"])
    for name, layer in masked_layers(model).items():
        if not _is_tied(layer) or name not in plan.layers:
            continue
        kept, n_in = state.get("tied", {}).get(name), len(plan.layers[name].in_keep)
        fits = isinstance(kept, Tensor) and kept.dtype == torch.long and kept.shape == (n_in,)
        if not fits or n_in and not (0 <= int(kept.min()) and int(kept.max()) < len(layer.prune_mask)):
            raise ValueError(
                f"the checkpoint's network was cut in its window, and the checkpoint does not say which of the tied "
                f"masks of {name!r} are left (share_masks): it cannot be resumed, start from one before the first cut"
            )
        plan.layers[name] = replace(plan.layers[name], in_keep=kept)
    return plan


def restore_cut(model: nn.Module, budget: MacBudget, state: Mapping[str, Any]) -> SlimPlan:
    """Brings a dense model's budget to a :func:`cut_state`, and returns the plan that brings the model there
    (``apply_plan(model, plan, keep_masks=True)``). Which channels stay comes with the state dict's values.

    Raises:
        ValueError: the state is of another network.
    """
    example: dict[str, Any] = dict(entries=None, present=budget.present, whole_tensors=True, spec={})
    if problem := unlike(state, example, "the state of the cut network"):
        raise ValueError(problem)
    entries, present = state["entries"], state["present"]
    fits = isinstance(entries, Tensor) and entries.dim() == 1 and entries.numel() and entries.dtype == torch.long
    if not fits or budget.cut is not None or int(entries.min()) < 0 or int(entries.max()) >= budget.n_entries:
        raise ValueError("the checkpoint's network was cut in its window, and is another one than this dense network")
    keep = torch.zeros(budget.n_entries, dtype=torch.bool)
    keep[entries] = True
    plan = plan_of_dense(model, budget, keep, present)
    if plan.spec() != state["spec"]:
        raise ValueError("the checkpoint's network was cut in its window, and not as this dense network would be")
    budget.cut_off(keep, plan, present, state["whole_tensors"])
    return plan
