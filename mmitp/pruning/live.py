"""Slimming a network in the middle of its training: the rest of the run trains what is left, and goes on the same.

What the masks drop has no say in the masked network's training either: the weights they multiply by zero, and the
channels no reader keeps, get gradients of exactly zero, BatchNorm treats every channel by itself, and an optimizer
that steps elementwise lets no weight feel its neighbours. So the losses of the shrunk network are those of the masked
one up to rounding, once parameters, running statistics and optimizer state are cut by the same indices.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from .budget import MacBudget
from .layers import masked_layers, memory_format, slim_kind
from .rng import kept_rng
from .slim import LayerPlan, SlimLayer, SlimPlan, apply_plan, slim_with_plan
from .verify import call_model, compare, copied, copy_of, doubled, tensors_in, train_without_noise, values_in

#: how far outputs in training mode may be apart: batch statistics enlarge rounding
TRAINING_RTOL = 1e-3


def plan_live(model: nn.Module, example_inputs: Any, budget: MacBudget, more_examples: Sequence[Any] = ()) -> SlimPlan:
    """The plan for slimming ``model`` under its present patterns and training it on.

    It is :func:`slim`'s plan, checked there on every example, but for masks that do not count in the budget (of layers
    the example never ran): their pattern is cut as well, since zeros folded into weights that train on would not stay.

    Raises:
        ValueError: the model carries no mask, or masks of granularity ``'weight'``.
        RuntimeError: as :func:`slim`.
    """
    require_channels(model)
    _, plan = slim_with_plan(model, example_inputs, budget, more_examples)
    for name, layer in masked_layers(model).items():
        keep = layer.binary_mask().cpu().nonzero().flatten()
        n_in, n_out = slim_kind(layer).channels(layer)  # type: ignore[union-attr]
        cut = plan.layers.get(name)
        if len(keep) == n_in or cut is not None and len(cut.in_keep) < n_in:
            continue
        if cut is None:
            plan.layers[name] = LayerPlan(keep, torch.arange(n_out), keep, None, n_out)
        else:
            plan.layers[name] = LayerPlan(keep, cut.out_keep, keep, cut.out_index, cut.out_width)
    return plan


def require_channels(model: nn.Module) -> None:
    """Refuses masks that no live network can be slimmed under.

    Raises:
        ValueError: masks of granularity ``'weight'``.
    """
    for name, layer in masked_layers(model).items():
        if layer.mask_granularity != "channel":
            raise ValueError(
                f"{name!r} masks single weights: they cannot be cut out, so the network cannot be slimmed while it "
                "trains; use masks of granularity 'channel', or slim_at_end=False"
            )


def require_same_training(model: nn.Module, plan: SlimPlan, example_inputs: Any, keep_masks: bool = False) -> None:
    """Refuses a plan under which the network's training pass on the example gives something else.

    That is so where the model trains on features that its evaluation pass does not read (auxiliary branches). Copies
    are compared. There is nothing to compare where a training pass wants more than the example (targets), and no value
    where it draws random numbers (dropout by modules is off).

    Args:
        model: masked model.
        plan: from :func:`plan_live`.
        example_inputs: as for its budget.
        keep_masks: as for :func:`shrink_live`.

    Raises:
        ValueError: what differs.
    """
    masked, small = copy_of(model), copy_of(model)
    shrink_live(small, plan, keep_masks=keep_masks)
    try:
        problem = _training_difference(masked, small, example_inputs)
        if problem:  # rounding can turn the order of proposals around; in float64 it does not
            problem = _training_difference(masked.double(), small.double(), doubled(example_inputs))
    except Exception:  # whatever a foreign model raises on an input that its training is not made for
        return
    if problem:
        raise ValueError(
            f"{type(model).__name__} does not train the same once slimmed ({problem}): its training pass reads "
            "features that its evaluation pass does not. Leave what it reads there dense (exclude, in mask_model), or "
            "train on under the masks and take a slimmed copy at the end (slim() without an optimizer)"
        )


def _training_difference(masked: nn.Module, small: nn.Module, example_inputs: Any) -> str:
    """Empty if both give the same in training mode, or random values, else what differs; what ``masked`` raises is
    raised."""
    expected, again = (_training_outputs(masked, example_inputs, seed) for seed in (0, 1))
    try:
        got = _training_outputs(small, example_inputs, 0)
    except Exception as error:  # narrower tensors may break any line of a model's code
        return f"{type(error).__name__}: {error}"
    return "" if compare(expected, again, TRAINING_RTOL) else compare(expected, got, TRAINING_RTOL)


@torch.no_grad()
def _training_outputs(model: nn.Module, example_inputs: Any, seed: int) -> dict[str, Tensor]:
    train_without_noise(model)
    with kept_rng(seed=seed):
        return {path: value.clone() for path, value in values_in(call_model(model, copied(example_inputs)))}


def shrink_live(
    model: nn.Module, plan: SlimPlan, optimizer: torch.optim.Optimizer | None = None, keep_masks: bool = False
) -> list[str]:
    """Shrinks a model by a plan while it trains: in place, its parameters staying the objects that they are.

    Gradients and every tensor of the optimizer's state that has its parameter's shape (momentum, Adam's moments) are
    cut with the parameter. The masks leave model and optimizer, or are cut like the other parameters; param groups
    stay, empty ones too, because learning rate schedules count them. Not wrapped for distributed training: a wrapper
    has to be taken off before and to be made anew after.

    Args:
        model: masked model.
        plan: from :func:`plan_live`, or :meth:`SlimPlan.from_spec` where weights and state are loaded afterwards.
        optimizer: the one that trains it, if any.
        keep_masks: as for :func:`~mmitp.pruning.apply_plan`.

    Returns:
        Names of the parameters whose optimizer state has another shape (factored moments): it starts anew.

    Raises:
        ValueError: the plan was made for another model, or a graph of the network is still alive (a loss that somebody
            keeps), which remembers the old shapes; nothing has changed then.
    """
    positions = _positions(model, plan, keep_masks)
    changing = [(n, p) for n, p in model.named_parameters() if n in positions and p.shape != positions[n].shape]
    if held := [name for name, p in changing if _in_a_graph(p)]:
        raise ValueError(
            f"a graph of the network is still alive (through {held[0]!r} and others): some loss or output is kept, and "
            "it remembers the shapes of before. Let go of it first (del loss, outputs; keep loss.item() or "
            "loss.detach())"
        )
    masks = {id(layer.prune_mask) for layer in masked_layers(model).values()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    apply_plan(model, plan, keep_masks)
    for name, layer in model.named_modules():
        if name in plan.layers and isinstance(layer, SlimLayer) and layer.out_index is not None:
            if layer.empty:
                layer.register_forward_hook(_keep_in_graph)
    if optimizer is not None and not keep_masks:
        _drop(optimizer, masks)
    restarted = []
    for name, p in model.named_parameters():
        if p.shape == shapes[name]:
            continue
        if p.grad is not None:
            p.grad = _cut(p.grad, positions[name])
        state = optimizer.state.get(p) if optimizer is not None else None
        if not state:
            continue
        tensors = {  # all but step counters
            key: value
            for key, value in state.items()
            if isinstance(value, Tensor) and (value.numel() > 1 or value.shape == shapes[name])
        }
        if any(value.shape != shapes[name] for value in tensors.values()):
            optimizer.state.pop(p)  # type: ignore[union-attr]
            restarted.append(name)
        else:
            state.update({key: _cut(value, positions[name]) for key, value in tensors.items()})
    if isinstance(optimizer, torch.optim.LBFGS):
        # Its history is of all parameters in one vector, which the first of them holds.
        optimizer.state.clear()
        optimizer._numel_cache = None
        restarted = [name for name, _ in model.named_parameters()]
    return restarted


@kept_rng()
def steps_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer moves every weight by itself, tried out on a small tensor with its own options.

    False for those whose step depends on norms or means of whole tensors (LARS, Lamb, Adafactor), which differ once
    channels are gone; false too where it cannot be tried out.
    """
    accepted = set(inspect.signature(type(optimizer).__init__).parameters) - {"params", "foreach", "fused"}
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    grads = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key in accepted - {"capturable"}}
        options["lr"] = 0.1  # the present one may be a warm-up's zero
        ends = []
        for rows in (4, 2):
            p = nn.Parameter(start[:rows].clone())
            try:
                probe = type(optimizer)([p], **options)
                for grad in grads:
                    p.grad = grad[:rows].clone()
                    probe.step()
            except Exception:  # a third party's optimizer may ask for anything
                return False
            ends.append(p.detach()[:2])
        if not torch.allclose(ends[0], ends[1], rtol=1e-9, atol=1e-12):
            return False
    return True


def _positions(model: nn.Module, plan: SlimPlan, keep_masks: bool) -> dict[str, Tensor]:
    """For each parameter that stays, which positions of its flattened self stay, in its new shape."""
    shadow = copy_of(model).cpu()
    for p in shadow.parameters():
        p.requires_grad_(False)
        p.data = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
    apply_plan(shadow, plan, keep_masks)
    return {name: p.data.long() for name, p in shadow.named_parameters()}


def _in_a_graph(p: nn.Parameter) -> bool:
    """Whether some graph of the past holds the node that accumulates the parameter's gradient."""
    if not p.requires_grad:
        return False

    def node() -> Any:
        with torch.enable_grad():
            return p.view_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    node().metadata["mmitp"] = True  # gone with the node, unless somebody else holds it
    return node().metadata.pop("mmitp", False)


def _cut(value: Tensor, positions: Tensor) -> Tensor:
    """What stays of a value of a parameter, in its layout: fused optimizers need that of the parameter."""
    return value.detach().reshape(-1)[positions.to(value.device)].contiguous(memory_format=memory_format(value))


def _drop(optimizer: torch.optim.Optimizer, ids: set[int]) -> None:
    for group in optimizer.param_groups:
        stays = [id(p) not in ids for p in group["params"]]
        for p in compress(group["params"], [not s for s in stays]):
            optimizer.state.pop(p, None)
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = compress(group[key], stays)


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        return out.clone()  # a view could not be changed in place by what follows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *[torch.zeros_like(source) for source in ctx.saved_tensors]


def _keep_in_graph(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    """A layer that computes nothing (no reader) passes on zero gradients, as under the mask.

    Without any, DistributedDataParallel would wait for the parameters up to it.
    """
    return _ZeroGradient.apply(out, *[t for t in tensors_in((args, list(layer.parameters()))) if t.requires_grad])


_keep_in_graph.of_empty_layers = True  # type: ignore[attr-defined]
