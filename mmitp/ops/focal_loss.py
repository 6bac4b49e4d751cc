"""Sigmoid focal loss (Lin et al. 2017) and its gradient, element by element, equal to mmcv's compiled operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _one_hot(logits: Tensor, target: Tensor) -> Tensor:
    """Boolean ``(N, C)``; targets equal to C mean background and give a row of False."""
    return target[:, None] == torch.arange(logits.shape[1], device=logits.device)


def sigmoid_focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Focal loss of each element.

    Args:
        logits: ``(N, C)``.
        target: Class indices ``(N,)``, C for background.
        gamma: Focusing exponent.
        alpha: Weight of the positives, ``1 - alpha`` of the negatives.

    Returns:
        ``(N, C)``.
    """
    p = logits.sigmoid()
    positive = -alpha * (1 - p) ** gamma * F.logsigmoid(logits)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-logits)
    return torch.where(_one_hot(logits, target), positive, negative)
