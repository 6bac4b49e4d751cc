"""What a pruner refuses: arguments out of range, masks that cannot train, a checkpoint of another network or target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mmitp.values import is_count, is_number

from .budget import MacBudget
from .cost import Cost
from .divisor import check_divisor
from .latency import LatencyCost
from .layers import masked_layers
from .masks import MaskedLayer

#: What a frozen pattern depends on: a run resumed after the freeze cannot change it.
OUTCOME = ("target", "divisor", "cost", "fill", "min_keep")


def frozen_otherwise(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Why a resumed run cannot go on: setting -> (the checkpoint's value, the present one)."""
    told = ", ".join(f"{key}={old!r}, now {key}={new!r}" for key, (old, new) in changed.items())
    return (
        f"the checkpoint's masks are frozen already, with {told}: resuming cannot change that. Resume with the former "
        "settings, or start a new run from its weights (load_from, or load_state_dict of the model alone)"
    )


def check_settings(
    target: float,
    b: float | str,
    lr: float,
    steps: int | None,
    push: str | None,
    min_keep: float,
    divisor: int | str,
    on_miss: str,
) -> None:
    """Refuses arguments of :class:`InTrainPruner` that are out of range.

    Raises:
        ValueError: names the argument and what it may be.
    """

    if not (is_number(target) and 0 < target < 1):
        raise ValueError(f"target must be a fraction of the operations in (0, 1), got {target!r}")
    if not (b == "auto" or is_number(b) and float(b) >= 0):
        raise ValueError(f"b must be a finite number >= 0 or 'auto', got {b!r}")
    if not (is_number(lr) and lr > 0):
        raise ValueError(f"lr must be a positive finite number, got {lr!r}")
    if steps is not None and not is_count(steps):
        raise ValueError(f"steps must be a positive number of optimizer steps, got {steps!r}")
    if b == "auto" and steps is None:
        raise ValueError("b='auto' needs steps, the number of optimizer steps that the window will have")
    if push not in (None, "plain", "balanced", "fisher"):
        raise ValueError(f"push must be 'plain', 'balanced' or 'fisher', got {push!r}")
    if push == "fisher" and b != "auto":
        raise ValueError(f"push='fisher' is an order in which masks go, for b='auto'; b={b!r} pushes all of them")
    if not (is_number(min_keep) and 0 <= min_keep < 1):
        raise ValueError(f"min_keep must be a part of a layer's channels in [0, 1), got {min_keep!r}")
    check_divisor(divisor)
    if on_miss not in ("project", "error", "warn"):
        raise ValueError(f"on_miss must be 'project', 'error' or 'warn', got {on_miss!r}")


def check_budget(budget: Any, cost: Any, masks: Mapping[str, MaskedLayer]) -> None:
    """Refuses a budget that is not that of the model, or of another cost than is asked for.

    Raises:
        ValueError: what does not fit.
    """
    if not isinstance(budget, MacBudget):
        raise ValueError(f"budget must be a MacBudget of the model, got {budget!r}")
    if cost not in ("macs", budget.cost):
        raise ValueError(
            f"the budget counts {budget.what}, and cost={cost!r} is asked for besides: give the cost to the budget "
            "(MacBudget(..., cost=...)) and leave it out here"
        )
    layers = {id(layer) for layer in masks.values()}
    if any(id(record.mask) not in layers for record in budget.layers if record.mask is not None):
        raise ValueError("the budget was recorded on another model (a copy is another one, too)")


def check_cuts(slim_every: Any, cost: Cost | None) -> None:
    """Refuses progressive slimming that cannot be.

    Raises:
        ValueError: ``slim_every`` is no number of steps; the budget is one of latency.
    """
    if not is_count(slim_every):
        raise ValueError(f"slim_every must be a positive number of optimizer steps, got {slim_every!r}")
    if isinstance(cost, LatencyCost):
        raise ValueError(
            "slim_every does not go with a latency budget: that is held to the clock beside the dense network, which "
            "is gone after the first cut. Leave slim_every out, or hold operations or parameters to the target"
        )


def require_trainable(masks: Mapping[str, MaskedLayer]) -> None:
    """Refuses masks that do not train although they are not frozen.

    Raises:
        ValueError: names the layers.
    """
    fixed = [n for n, m in masks.items() if not (m.mask_frozen or m.prune_mask.requires_grad)]
    if fixed:
        raise ValueError(
            f"the masks of {', '.join(fixed[:3])} ({len(fixed)} in all) do not train: something, such as "
            "frozen_stages, froze these layers after the model was built. Leave them dense: "
            f"model.prune = dict(exclude={fixed})"
        )


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in a wrapper around it (Accelerate's, mmengine's), whose step hooks are those that run.

    Raises:
        ValueError: there is none.
    """
    bare = optimizer
    while not hasattr(bare, "_optimizer_step_pre_hooks"):
        if not hasattr(bare, "optimizer"):
            raise ValueError(f"attach() takes a torch optimizer, got {type(optimizer).__name__}")
        bare = bare.optimizer
    return bare


def require_in_optimizer(masks: Mapping[str, MaskedLayer], optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that lacks some of the masks.

    Raises:
        ValueError: names the first such layer.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, layer in masks.items() if id(layer.prune_mask) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold the mask of {missing[0]!r} ({len(missing)} in all): masks must be in "
            "the model before the optimizer is built (mask_model; mmitp.MaskedModel in a config)"
        )


def mask_layout(model: nn.Module) -> dict[str, Any]:
    """Which layers carry masks, of which shape, and which share one or are tied: plain names and numbers."""
    layers = masked_layers(model)
    first: dict[int, str] = {}
    return {
        name: dict(
            shape=list(layer.prune_mask.shape),
            shared_from=first.setdefault(id(layer.prune_mask), name),
            tied=layer.mask_ties is not None,
        )
        for name, layer in layers.items()
    }


def layout_of_state(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """:func:`mask_layout` as far as a model's state dict shows it.

    Args:
        state_dict: has an entry for every name of a layer.
        model: says which names mean one layer, as RTMDet's heads of several levels do: such a layer counts once.
    """
    every, end = dict(model.named_modules(remove_duplicate=False)), ".prune_mask"
    again = every.keys() - dict(model.named_modules()).keys()
    masks = {key[: -len(end)]: value for key, value in state_dict.items() if key.endswith(end)}
    return {name: dict(shape=list(mask.shape)) for name, mask in masks.items() if name not in again}


def require_same_layout(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to resume a checkpoint whose masks are others than the model's.

    Args:
        then: the checkpoint's layout.
        now: the model's.

    Raises:
        ValueError: says how they differ.
    """
    way = (
        "Resume with the model that it was trained with (model.prune: granularity, include, exclude, share), or start "
        "a new run from its weights (load_from instead of resume)"
    )
    if now and not then:
        raise ValueError(f"the checkpoint to resume has no masks, the model has {len(now)}. {way}")
    lost, new = [n for n in then if n not in now], [n for n in now if n not in then]
    if lost or new:
        raise ValueError(
            f"the checkpoint to resume has masks on {len(then)} layers, the model on {len(now)}; "
            f"only in the checkpoint: {lost[:3]}, only in the model: {new[:3]}. {way}"
        )
    for name, entry in then.items():
        if list(entry["shape"]) != list(now[name]["shape"]):
            raise ValueError(
                f"the mask of {name!r} is of shape {tuple(entry['shape'])} in the checkpoint to resume and of "
                f"{tuple(now[name]['shape'])} in the model. {way}"
            )
        known = entry.keys() & {"shared_from", "tied"}  # a bare state dict shows neither
        if any(entry[key] != now[name][key] for key in known):
            raise ValueError(f"the mask of {name!r} is shared otherwise than in the checkpoint to resume. {way}")
