"""What a step of Optimizer 2 remembers on the device, so that nothing has to be read there."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceState:
    """What :meth:`InTrainPruner.update` remembers, where the masks are: it is changed in place.

    Attributes:
        counts: ``(3,)`` int64: steps seen in the window, those of them skipped, and steps since a mask was first not
            finite (that one counts too).
        poisoned: flat bool, the masks that were not finite then.
        floor: see :func:`mmitp.pruning.freeze.floors`.
    """

    def __init__(self, masks: Tensor, floor: Tensor) -> None:
        self.counts = torch.zeros(3, dtype=torch.long, device=masks.device)
        self.poisoned = torch.zeros_like(masks, dtype=torch.bool)
        self.floor = floor.to(masks.device)

    @property
    def seen(self) -> Tensor:
        return self.counts[0]

    def to(self, masks: Tensor) -> None:
        """Moves along with a model that was moved."""
        if self.counts.device != masks.device:
            for name in ("counts", "poisoned", "floor"):
                setattr(self, name, getattr(self, name).to(masks.device))

    def start(self, seen: int, skipped: int) -> None:
        """Goes on after so many steps of the window."""
        self.counts.copy_(torch.tensor([seen, skipped, 0]))
        self.poisoned.zero_()

    def note(self, masks: Tensor) -> Tensor:
        """Remembers the first masks that are not finite; whether all are now."""
        wrong = ~torch.isfinite(masks)
        self.poisoned.copy_(torch.where(self.poisoned.any(), self.poisoned, wrong))
        self.counts[2].add_(self.poisoned.any())
        return ~wrong.any()

    def keep(self, keep: Tensor) -> None:
        """Forgets the entries not in ``keep`` (flat bool)."""
        self.poisoned = self.poisoned[keep.to(self.poisoned.device)]

    def count(self, usable: Tensor) -> None:
        """Counts a step of the window."""
        self.counts[0].add_(1)
        self.counts[1].add_(~usable)
