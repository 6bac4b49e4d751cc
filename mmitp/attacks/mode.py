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

# Attributes that layers hand to functional dropout in training mode: MultiheadAttention of torch and mmcv, mmpretrain's
# attention, DenseNets, transformers' models.
_DROP_RATES = (
    "dropout",
    "dropout_p",
    "dropout_rate",
    "drop_rate",
    "attn_drop",
    "attn_drop_rate",
    "attn_dropout",
    "attention_dropout",
    "activation_dropout",
)


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
            exactly; ``"eval"``: running statistics are used and stay as they are. Save for ``"train"``, other buffers
            (the state that some losses keep) are put back, too.
        dropout: ``"train"``: as it stands; ``"eval"``: dropout, drop path and drop block are switched off, and the
            dropout within attention.
        freeze: switch ``requires_grad`` off for all parameters meanwhile, which saves memory, and put back all buffers
            but running statistics. Not inside a distributed wrapper's training step.

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
    rates = [
        (module, name, rate)
        for module in model.modules()
        if dropout == "eval" and module.training
        for name, rate in vars(module).items()
        if name in _DROP_RATES and isinstance(rate, float) and rate > 0
    ]
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if _keeps_buffers(module, batchnorm, freeze)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "with_cp", False) is True]
    try:
        for block in checkpointed:
            block.with_cp = False
        for module in switched:
            # Not .eval(): modules that override train() may do more than flip the flag.
            module.training = False
        for module, name, _ in rates:
            # Not .training: the module may do more in training mode than drop.
            setattr(module, name, 0.0)
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield model
    finally:
        for block in checkpointed:
            block.with_cp = True
        for module in switched:
            module.training = True
        for module, name, rate in rates:
            setattr(module, name, rate)
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, name, buffer, value in saved:
            # Through .data: the attack's graph is gone, and no version counter needs to know.
            buffer.data.copy_(value)
            module._buffers[name] = buffer  # where the forward pass has put another tensor in its place


def _keeps_buffers(module: nn.Module, batchnorm: BatchNormMode, freeze: bool) -> bool:
    if isinstance(module, _NormBase):
        return batchnorm == "batch" and module.training
    return batchnorm != "train" or freeze


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) or type(module).__name__ in _DROP_NAMES
