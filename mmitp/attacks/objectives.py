"""Losses for attacks to raise: classifiers' logits and detectors' heat maps.

An *untargeted* attack on a detector needs no function of its own: it raises the detector's training loss, against the
ground truth or against its own detections on the clean image. The other two objectives of TOG (Chow et al. 2020,
"Adversarial objectness gradient attacks in real-time object detection systems") speak of objectness alone:
:func:`vanishing` makes objects disappear and :func:`fabrication` makes them appear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Predict = Callable[[Tensor], Tensor]


def cross_entropy(predict: Predict, target: Tensor) -> Callable[[Tensor], Tensor]:
    """``loss_fn`` giving each sample's cross-entropy.

    Args:
        predict: batch to logits ``(N, K)``.
        target: class indices ``(N,)`` or class probabilities ``(N, K)`` (mixup).
    """
    return lambda x: F.cross_entropy(predict(x), target, reduction="none")


def margin(predict: Predict, target: Tensor) -> Callable[[Tensor], Tensor]:
    """``loss_fn`` giving each sample's best wrong logit minus its right one: positive where it is misclassified.

    Between restarts it picks the run that fools the model, which cross-entropy need not.

    Args:
        predict: batch to logits ``(N, K)``.
        target: class indices ``(N,)``.
    """

    def loss_fn(x: Tensor) -> Tensor:
        logits = predict(x)
        right = F.one_hot(target, logits.shape[1]).bool()
        return logits.masked_fill(right, -torch.inf).amax(1) - logits.gather(1, target[:, None])[:, 0]

    return loss_fn


def vanishing(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Raise this to make objects vanish: minus the binary cross-entropy of the score maps against "no object anywhere".

    Args:
        logits: one ``(N, ...)`` score map before the sigmoid or one for each level (heat maps of a CenterNet, class
            maps of a RetinaNet). Scores after a sigmoid go through ``torch.logit(scores, eps=1e-6)`` first.

    Returns:
        One value a sample, ``(N,)``, at most 0; summed over positions, so that a confident peak counts most.
    """
    return -fabrication(logits)


def fabrication(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Raise this to make objects appear: the binary cross-entropy of the score maps against "no object anywhere".

    Args:
        logits: as for :func:`vanishing`.

    Returns:
        One value a sample, ``(N,)``, at least 0.

    Raises:
        ValueError: for an empty sequence of levels.
    """
    levels = [logits] if isinstance(logits, Tensor) else list(logits)
    if not levels:
        raise ValueError("no score map given: the model returned an empty list of levels")
    # -log(1 - sigmoid(z)) = softplus(z)
    return torch.stack([F.softplus(level.float()).flatten(1).sum(1) for level in levels]).sum(0)
