"""The attack that a test is run under: names, numbers and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mmitp.attacks import check_pixels
from mmitp.attacks.arguments import Norm
from mmitp.values import is_count, is_number

AttackName = Literal["fgsm", "fgsm_rs", "pgd", "autoattack"]
Objective = Literal["truth", "own", "vanishing", "fabrication"]


@dataclass(frozen=True)
class EvalAttack:
    """An attack to evaluate under; its size ``eps`` is given apart.

    Args:
        name: ``"fgsm"``: one step of length eps from the image itself; ``"fgsm_rs"``: one step from a random start;
            ``"pgd"``; ``"autoattack"``: the standard version (classifiers only).
        alpha: step in pixels/255, positive; ``None``: 1.25 eps for ``"fgsm_rs"``, eps / 4 for ``"pgd"``. The others
            have none.
        steps: of ``"pgd"``.
        restarts: of ``"pgd"``; each image keeps the run with the highest loss.
        norm: ``"linf"`` or ``"l2"``; ``"fgsm_rs"`` is l-inf only.
        objective: what is raised. ``"truth"``: a classifier's cross-entropy against the label, a detector's training
            loss against the ground truth. Detectors also take ``"own"``, ``"vanishing"`` and ``"fabrication"``, see
            :func:`mmitp.engine.detector_attack.detector_loss`.
        score_thr: least score of a detection that counts for ``"own"``.
        seed: of the random starts, which depend on it and on the batch's number alone: a masked and a slimmed network
            are attacked from the same ones.
        pixel_range: full white before normalisation, 255 or, where the pipeline scales images to [0, 1], 1.

    Raises:
        ValueError: for values that make no attack.
    """

    name: AttackName = "pgd"
    alpha: float | None = None
    steps: int = 20
    restarts: int = 1
    norm: Norm = "linf"
    objective: Objective = "truth"
    score_thr: float = 0.3
    seed: int = 0
    pixel_range: float = 255.0

    def __post_init__(self) -> None:
        for key, allowed in (("name", AttackName), ("norm", Norm), ("objective", Objective)):
            if getattr(self, key) not in get_args(allowed):
                raise ValueError(f"{key} must be one of {get_args(allowed)}, got {getattr(self, key)!r}")
        check_pixels(eps=1.0, alpha=self.alpha, steps=self.steps, restarts=self.restarts, norm=self.norm)
        scaled = is_number(self.pixel_range) and self.pixel_range > 0
        if self.steps < 1 or not scaled or not (is_number(self.score_thr, 0) and self.score_thr <= 1):
            raise ValueError(
                "steps must be at least 1, pixel_range positive and finite, and score_thr in [0, 1], got "
                f"{self.steps!r}, {self.pixel_range!r}, {self.score_thr!r}"
            )
        if not is_count(self.seed, 0):
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        if self.name == "fgsm_rs" and self.norm != "linf":
            raise ValueError("fgsm_rs is an l-inf attack: take fgsm or pgd for l2")
        if self.alpha is not None and self.name in ("fgsm", "autoattack"):
            raise ValueError(f"{self.name} takes no alpha: its step follows from eps")
        if self.name == "autoattack" and self.objective != "truth":
            raise ValueError(f"AutoAttack is for classifiers and has no objective {self.objective!r}")

    def step(self, eps: float) -> float:
        """Length of a step at size ``eps``, pixels/255."""
        if self.alpha is not None:
            return self.alpha
        return eps * {"fgsm": 1.0, "fgsm_rs": 1.25, "pgd": 0.25}[self.name]

    def check(self, eps: Sequence[float]) -> list[str]:
        """Whether the attack can be made at these sizes, in pixels/255; returns what is allowed but hardly meant.

        Raises:
            ValueError: for no size, one twice, or one that is no size of an attack: negative, not finite, above 255.
        """
        steps = self.steps if self.name == "pgd" else 1
        doubts = [
            doubt for size in eps for doubt in check_pixels(eps=size, alpha=self.alpha, norm=self.norm, steps=steps)
        ]
        if not eps or len(set(eps)) != len(eps):
            raise ValueError(f"eps needs at least one size, none twice, got {list(eps)}")
        return doubts

    def slug(self) -> str:
        """The attack as a part of a file's name: ``pgd20-linf``, ``pgd50x10-l2-own``."""
        count = f"{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "") if self.name == "pgd" else ""
        objective = f"-{self.objective}" if self.objective != "truth" else ""
        return f"{self.name}{count}-{self.norm}{objective}"

    def describe(self) -> str:
        """The attack in one line."""
        if self.name == "autoattack":
            text = f"AutoAttack (standard, {self.norm})"
        elif self.name == "pgd":
            alpha = f"{self.alpha:g}/255" if self.alpha is not None else "eps/4"
            text = f"PGD-{self.steps} ({self.norm}, step {alpha}, restarts {self.restarts})"
        else:
            alpha = f"{self.alpha:g}/255" if self.alpha is not None else "eps" if self.name == "fgsm" else "1.25 eps"
            text = f"{'FGSM' if self.name == 'fgsm' else 'FGSM-RS'} ({self.norm}, step {alpha})"
        own = f" of at least {self.score_thr:g}" if self.objective == "own" else ""
        return f"{text}, objective {self.objective}{own}, seed {self.seed}"
