"""Adversarial attacks: torch only, no OpenMMLab. Invariants of every attack stand in :mod:`mmitp.attacks.gradient`."""

from mmitp.attacks.gradient import evaluate_loss, fgsm_rs, grad_align, input_gradient, n_fgsm, pgd
from mmitp.attacks.mode import attack_mode
from mmitp.attacks.objectives import cross_entropy, fabrication, margin, vanishing
from mmitp.attacks.suites import AutoAttackResult, NormalizedClassifier, autoattack_accuracy

__all__ = [
    "AutoAttackResult",
    "NormalizedClassifier",
    "attack_mode",
    "autoattack_accuracy",
    "cross_entropy",
    "evaluate_loss",
    "fabrication",
    "fgsm_rs",
    "grad_align",
    "input_gradient",
    "margin",
    "n_fgsm",
    "pgd",
    "vanishing",
]
