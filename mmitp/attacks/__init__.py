"""Adversarial attacks: torch only, no OpenMMLab. Invariants of every attack stand in :mod:`mmitp.attacks.gradient`."""

from mmitp.attacks.arguments import check_arguments, check_pixels
from mmitp.attacks.collapse import CollapseRule, Probe, Verdict
from mmitp.attacks.gradient import evaluate_loss, fgsm_rs, grad_align, input_gradient, n_fgsm, pgd
from mmitp.attacks.mode import attack_mode
from mmitp.attacks.objectives import cross_entropy, fabrication, margin, vanishing
from mmitp.attacks.suites import AutoAttackResult, NormalizedClassifier, autoattack_accuracy, pick_logits

__all__ = [
    "AutoAttackResult",
    "CollapseRule",
    "NormalizedClassifier",
    "Probe",
    "Verdict",
    "attack_mode",
    "autoattack_accuracy",
    "check_arguments",
    "check_pixels",
    "cross_entropy",
    "evaluate_loss",
    "fabrication",
    "fgsm_rs",
    "grad_align",
    "input_gradient",
    "margin",
    "n_fgsm",
    "pgd",
    "pick_logits",
    "vanishing",
]
