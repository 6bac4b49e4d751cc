"""Slimming the network inside a Runner: what a Runner keeps beside the model, and whether the model bears it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import EMAHook, Hook
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from mmitp.engine.attack import unwrap
from mmitp.pruning import MacBudget, SlimPlan, masked_layers, randomize_masks
from mmitp.pruning.live import plan_live, shrink_live, steps_elementwise
from mmitp.pruning.rng import kept_rng
from mmitp.pruning.verify import compare, copy_of, doubled, train_without_noise


def require_slimmable(runner: Runner) -> None:
    """Refuses at the start of a run what could not be slimmed at the freeze.

    Raises:
        ValueError: compiled models, wrappers other than DistributedDataParallel, sharded optimizers, masks on weights.
    """
    model = unwrap(runner.model)
    # mmengine's compile= compiles the model's train_step, which notices that layers have changed. What holds a layer
    # itself in compiled form does not.
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        raise ValueError(
            "slim_at_end changes the network in mid-run, which is not supported for a compiled one (model.compile(), "
            "torch.compile(model)): leave it as it is and compile by the config's compile=, or turn off slim_at_end"
        )
    if is_model_wrapper(runner.model) and runner.cfg.get("compile"):
        raise ValueError(
            "slim_at_end puts a new wrapper around the slimmed model, whose train_step would not be the compiled one: "
            "turn off the config's compile=, or slim_at_end, in distributed training"
        )
    if is_model_wrapper(runner.model) and not isinstance(runner.model, MMDistributedDataParallel):
        raise ValueError(
            f"slim_at_end can take a MMDistributedDataParallel wrapper off and put it on again, not a "
            f"{type(runner.model).__name__}"
        )
    optimizer = runner.optim_wrapper.optimizer
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
        raise ValueError("slim_at_end needs the whole optimizer state in every process, not ZeroRedundancyOptimizer")
    for name, layer in masked_layers(model).items():
        if layer.mask_granularity != "channel":
            raise ValueError(f"slim_at_end needs masks of granularity 'channel', {name!r} masks single weights")
    if not steps_elementwise(optimizer):
        runner.logger.warning(
            f"slim_at_end: {type(optimizer).__name__} does not step elementwise (or could not be tried out): after "
            "the freeze the slimmed network is not trained exactly as the masked one would be"
        )


def require_same_training(model: nn.Module, example_inputs: Any, batch: Any) -> None:
    """Tries slimming on a copy, with random patterns unless frozen: its training loss has to be the masked copy's.

    It is not where the model trains on features that the recorded pass does not read (auxiliary branches).

    Args:
        model: unwrapped masked model.
        example_inputs: as for its budget.
        batch: of the training loader.

    Raises:
        ValueError: the losses differ.
    """
    with without_runner_hooks(model), kept_rng():
        masked = copy_of(model)
        # As for training, which is what batch augmentations and soft labels are made for.
        data = masked.data_preprocessor(copy.deepcopy(batch), True)  # type: ignore[operator]
        randomize_masks(masked, 0.5, torch.Generator().manual_seed(0))
        plan = plan_live(masked, example_inputs, MacBudget(masked, example_inputs))
        small = copy_of(masked)
        shrink_live(small, plan)
        problem = _difference(masked, small, data)
        doubt = torch.tensor(float(bool(problem)), device=next(model.parameters()).device)
        all_reduce(doubt)  # losses may communicate: every process has to take the same way
        if bool(doubt):  # rounding can turn the order of proposals around; in float64 it does not
            problem = _difference(masked.double(), small.double(), doubled(data))
    if problem:
        raise ValueError(
            f"slim_at_end: {type(model).__name__} does not train the same once slimmed ({problem}): its training reads "
            "features that its forward pass in 'tensor' mode does not. Exclude what it reads from the masks "
            "(model.prune.exclude), or turn slim_at_end off and slim the checkpoint"
        )


def slim_runner(runner: Runner, plan: SlimPlan, keep_masks: bool = False) -> list[str]:
    """Shrinks the Runner's model with its optimizer state, averaged copies and distributed wrapper.

    No graph of the present network may be alive (a loss that somebody keeps): it remembers the gradients' old shapes.
    With ``keep_masks`` the masks stay, in all of them, and train on.

    Returns:
        Names of parameters whose optimizer state starts anew, see :func:`mmitp.pruning.live.shrink_live`.
    """
    model = unwrap(runner.model)
    wrapped = is_model_wrapper(runner.model)
    runner.model = model
    gc.collect()  # the wrapper's reducer, which remembers the old shapes too, sits in a reference cycle
    wrapper = runner.optim_wrapper
    with without_runner_hooks(model):
        optimizer = wrapper.optimizer if isinstance(wrapper, OptimWrapper) else None
        restarted = shrink_live(model, plan, optimizer, keep_masks)
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            averaged = hook.ema_model
            shrink_live(averaged.module, plan, keep_masks=keep_masks)
            averaged.avg_parameters = (
                averaged.module.state_dict() if averaged.update_buffers else dict(averaged.module.named_parameters())
            )
    if wrapped:
        runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)
        runner.model.train(model.training)
    return restarted


@contextmanager
def without_runner_hooks(model: nn.Module) -> Iterator[None]:
    """Takes off forward hooks that are methods of the Runner's hooks: a copy of the model would copy the Runner."""
    taken = []
    for module in model.modules():
        for key, call in list(module._forward_hooks.items()):
            if isinstance(getattr(call, "__self__", None), Hook):
                taken.append((module._forward_hooks, key, module._forward_hooks.pop(key)))
    try:
        yield
    finally:
        for hooks, key, call in taken:
            hooks[key] = call


@torch.no_grad()
def _difference(masked: Any, small: Any, data: Any, rtol: float = 1e-3) -> str:
    """Empty if both models have the same training loss."""
    losses = []
    for model in (masked, small):
        train_without_noise(model)
        try:
            with kept_rng(seed=0):
                losses.append(dict(loss=model.parse_losses(model._run_forward(copy.deepcopy(data), mode="loss"))[0]))
        except Exception as error:
            if model is masked:
                raise
            return f"{type(error).__name__}: {error}"
    return compare(losses[0], losses[1], rtol)
