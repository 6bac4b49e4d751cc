"""When single-step adversarial training has collapsed: a rule on probes, without a model.

Catastrophic overfitting (Wong et al. 2020): within an epoch a network learns to withstand the single step it is trained
on and nothing else. A probe attacks the same images with that step and with PGD at the same size; what tells a collapse
from a network that is merely weak is the gap between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mmitp.values import is_number


@dataclass(frozen=True)
class Probe:
    """What a network reaches on the probed images; of every result, higher is better.

    Attributes:
        single: under the training attack: accuracy, or any positive figure of merit.
        pgd: under PGD of the same size.
        chance: accuracy of guessing; 0 where the figure knows no guessing (a detector's inverse loss).
        images: number of images probed.
    """

    single: float
    pgd: float
    chance: float = 0.0
    images: int = 1


@dataclass(frozen=True)
class Verdict:
    """What a probe says.

    Attributes:
        collapsed: whether robustness to PGD is gone while the training attack is withstood.
        good: whether the network is one to go back to. A probe may be neither: before anything is learned, and where a
            result is not a number.
        reason: a clause for the log, empty where the network is good.
    """

    collapsed: bool
    good: bool
    reason: str


class CollapseRule:
    """Judges one probe after another, by the best before it.

    A collapse is a probe whose PGD result is worse than ``gap`` times that under the training attack, which itself
    beats guessing, and which is

    - worse than ``drop`` times the best PGD result so far, at whatever size of the attack; or
    - no better than guessing, while the training attack's beats it by three standard errors of the images probed: so
      says the first probe of a network that collapsed before it.

    The gap is needed in both: a size of the attack that grows, or a learning rate that shakes the network, lowers both
    results. In single-step training of small networks on CIFAR-10 that did not collapse (eps 8 to 52, alpha 2 eps,
    probes of 64 to 200 images), PGD kept 0.64 to 1.23 of the training attack's accuracy wherever that beat guessing,
    but 0.41 in the first iterations, when neither did. Such a probe is no collapse, and not a network to go back to
    either; that has no gap, and beats guessing under PGD.

    Args:
        drop: in (0, 1].
        gap: in (0, 1].

    Raises:
        ValueError: for other values.
    """

    def __init__(self, drop: float = 0.5, gap: float = 0.5) -> None:
        if not (is_number(drop) and is_number(gap) and 0 < drop <= 1 and 0 < gap <= 1):
            raise ValueError(f"drop and gap must lie between 0 and 1, got drop={drop!r}, gap={gap!r}")
        self.drop, self.gap = drop, gap
        self.best = 0.0

    def judge(self, probe: Probe) -> Verdict:
        """What ``probe`` says in view of those before it; it is remembered."""
        single, pgd, chance = probe.single, probe.pgd, probe.chance
        if not (math.isfinite(single) and math.isfinite(pgd)):
            return Verdict(False, False, f"the results are not finite: {single:.4g} and {pgd:.4g} under PGD")
        best, self.best = self.best, max(self.best, pgd)
        against = f"{pgd:.4g} under PGD against {single:.4g} under the training attack"
        if pgd >= self.gap * single:
            if pgd > chance:
                return Verdict(False, True, "")
            return Verdict(False, False, f"{against}, where guessing gives {chance:.4g}")
        clearly = chance + 3 * math.sqrt(chance * (1 - chance) / probe.images)
        if single > chance and pgd < self.drop * best:
            return Verdict(True, False, f"{against}, and {best:.4g} under PGD before")
        if 0 < chance and pgd <= chance and single > clearly:
            return Verdict(True, False, f"{against}, where guessing gives {chance:.4g}")
        return Verdict(False, False, f"{against}, which may be a collapse or a network that has learned nothing yet")

    def state_dict(self) -> dict[str, Any]:
        """What later verdicts depend on: plain numbers."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if not is_number(state.get("best")):
            raise ValueError(f"the rule's best result must be a finite number, got {state.get('best')!r}")
        self.best = float(state["best"])
