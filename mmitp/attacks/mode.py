"""The state a model is in while it is attacked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

BatchNormMode = Literal["train", "batch", "eval"]
DropoutMode = Literal["train", "eval"]

# Stochastic layers of common model zoos, which do not derive from torch's dropout.
_DROP_NAMES = frozenset({"DropPath", "DropBlock", "StochasticDepth"})


def check_mode(batchnorm: str, dropout: str) -> None:
    """Raises ``ValueError`` for a mode that :func:`attack_mode` does not know."""
    if batchnorm not in get_args(BatchNormMode):
        raise ValueError(f"batchnorm must be one of {get_args(BatchNormMode)}, got {batchnorm!r}")
    if dropout not in get_args(DropoutMode):
        raise ValueError(f"dropout must be one of {get_args(DropoutMode)}, got {dropout!r}")


@contextmanager
def attack_mode(
    model: nn.Module,
    *,
    batchnorm: BatchNormMode = "train",
    dropout: DropoutMode = "train",
    freeze: bool = False,
) -> Iterator[nn.Module]:
    """Hold normalisation, dropout and parameters in a chosen state for an attack, and restore them after it.

    Activation checkpointing (OpenMMLab's ``with_cp``) is off meanwhile: with it torch gives no gradient for an input.

    ``"train"`` leaves layers as they stand: in a training run in training mode, except those the run keeps in eval.

    Args:
        model: model under attack.
        batchnorm: ``"train"``: as they stand, so in training mode the attack's pass also updates the running statistics
            (FastAT's reference code does this); ``"batch"``: the same figures, but running statistics are put back
            exactly; ``"eval"``: running statistics are used and stay as they are.
        dropout: ``"train"``: as it stands; ``"eval"``: dropout, drop path and drop block are switched off.
        freeze: switch ``requires_grad`` off for all parameters meanwhile, which saves memory. Not inside a
            distributed wrapper's training step.

    Yields:
        The model.

    Raises:
        ValueError: for an unknown mode.
    """
    check_mode(batchnorm, dropout)
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    drops = [module for module in model.modules() if _is_dropout(module) and module.training]
    frozen = [parameter for parameter in model.parameters() if freeze and parameter.requires_grad]
    switched = (norms if batchnorm == "eval" else []) + (drops if dropout == "eval" else [])
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)] if batchnorm == "batch" else []
    saved = [buffer.clone() for buffer in buffers]
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "with_cp", False) is True]
    try:
        for block in checkpointed:
            block.with_cp = False
        for module in switched:
            # Not .eval(): modules that override train() may do more than flip the flag.
            module.training = False
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield model
    finally:
        for block in checkpointed:
            block.with_cp = True
        for module in switched:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(True)
        for buffer, value in zip(buffers, saved, strict=True):
            # Through .data: the attack's graph is gone, and no version counter needs to know.
            buffer.data.copy_(value)


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) or type(module).__name__ in _DROP_NAMES
