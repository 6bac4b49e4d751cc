"""What is for classifiers alone: AutoAttack, and what is said where it does not fit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmitp.attacks import NormalizedClassifier, autoattack_accuracy
from mmitp.engine.attack import PixelUnits, logits_of
from mmitp.engine.robust_eval.settings import EvalAttack

FOR_CLASSIFIERS = "AutoAttack is for classifiers with one gt_label a sample: take pgd or fgsm"
NOT_FOR_MULTI_LABEL = (
    "evaluation attacks know classifiers with one label an image, and {} is the head of a multi-label one, for which "
    "there is no attack"
)
NOT_FOR_CLASSIFIERS = "objective {!r} is for detectors, and these samples have one gt_label each: take 'truth'"


def run_autoattack(
    model: nn.Module, x: Tensor, labels: Tensor, units: PixelUnits, eps: float, attack: EvalAttack
) -> tuple[Tensor, list[str]]:
    """AutoAttack's standard version on normalised images.

    Args:
        model: the unwrapped classifier.
        x: normalised images ``(N, C, H, W)``.
        labels: class indices ``(N,)``.
        units: the images' pixel units.
        eps: size in pixels/255; 0 changes nothing.
        attack: its norm and its seed.

    Returns:
        The adversarial images, like ``x``, and the suite's warnings that its figure may be unreliable.
    """
    if eps == 0:
        return x, []
    span = units.high - units.low
    pixels = ((x - units.low) / span).clamp(0, 1)
    classifier = NormalizedClassifier(
        _Logits(model), (-units.low / span).flatten().tolist(), (1 / span).flatten().tolist(), pixel_range=1.0
    )
    result = autoattack_accuracy(
        classifier.to(x.device),
        pixels,
        labels,
        eps=eps / 255,
        norm="Linf" if attack.norm == "linf" else "L2",
        batch_size=len(x),
        seed=attack.seed,
    )
    assert result.adversarial is not None
    found = result.adversarial.to(x.device)
    return torch.where(found != pixels, found * span + units.low, x), result.flags


class _Logits(nn.Module):
    """The classifier as a module on normalised images, for suites that look for its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model)(x)
