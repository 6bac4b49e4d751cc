"""In-train pruning (CVPRW 2021, S1/S2): trainable masks under an operation budget. torch only.

``masks`` holds the equations of the mask, ``layers`` and ``convert`` put it on a model, ``graph`` and ``needs`` find
out who reads whose channels, ``budget`` is the hardware loss, ``pruner`` takes the steps of Optimizer 2, ``freeze``
fixes the masks under the target, ``slim`` removes what they leave unread (``live`` in mid-training). ``verify`` and
``rng`` are what all checks stand on.

Words: an input channel is *kept* by a layer whose mask entry for it is on, and *needed* while any of its readers keeps
it. *Coupled* channels stand in one place of tensors that the model's code adds up or normalises together (elsewhere: a
dependency group); a tensor of the slimmed network keeps them all while one of them is needed. Channels that the same
mask entries keep have one *reader set*.

For deployment: :func:`slim`, then, if at all, :func:`fold_norms`, and :func:`without_gathers` for runtimes that cannot
gather. Where a masked network goes to code that reads its weights (fusion, re-parameterisation, converters),
:func:`fold_masks` comes first.
"""

from .budget import LayerRow, MacBudget
from .convert import fold_masks, mask_model, share_masks
from .deploy import fold_norms
from .distill import distillation_loss, open_masks
from .freeze import freeze_masks, project
from .freeze_report import FreezeReport
from .gatherless import without_gathers
from .graph import register_op
from .layers import (
    MaskedConv2d,
    MaskedConvTranspose2d,
    MaskedLinear,
    masked_layers,
    randomize_masks,
    register_channelwise,
    register_kind,
)
from .masks import MaskedLayer
from .narrow import narrow_pattern
from .pruner import InTrainPruner
from .slim import SlimPlan, apply_plan, slim

__all__ = [
    "FreezeReport",
    "InTrainPruner",
    "LayerRow",
    "MacBudget",
    "MaskedConv2d",
    "MaskedConvTranspose2d",
    "MaskedLayer",
    "MaskedLinear",
    "SlimPlan",
    "apply_plan",
    "distillation_loss",
    "fold_masks",
    "fold_norms",
    "freeze_masks",
    "mask_model",
    "masked_layers",
    "narrow_pattern",
    "open_masks",
    "project",
    "randomize_masks",
    "register_channelwise",
    "register_kind",
    "register_op",
    "share_masks",
    "slim",
    "without_gathers",
]
