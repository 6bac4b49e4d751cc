"""Training steps of a known relative length, for networks of which nothing is known."""

from __future__ import annotations

from typing import Any

import torch


class SmallSteps(torch.optim.Optimizer):
    """Moves each tensor down its gradient by a fraction of its own length, whatever the gradient's size.

    A network deep enough, with random weights under normalisation layers that stay in eval mode, has gradients of any
    size: no learning rate suits all of its tensors, or the next network's.

    Args:
        params: as of any optimizer.
        fraction: length of a step by the tensor's; a tensor of zeros counts as one of length 1 for each output channel.
    """

    def __init__(self, params: Any, fraction: float = 1e-3) -> None:
        super().__init__(params, dict(fraction=fraction))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leaves a tensor alone whose gradient is zero or not finite."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                largest = parameter.grad.abs().max()
                if largest > 0 and torch.isfinite(largest):
                    direction = parameter.grad / largest  # the square of a large gradient would overflow
                    length = parameter.norm()
                    if length == 0:
                        length = length.new_tensor(float(parameter.shape[0] if parameter.dim() else 1)).sqrt()
                    parameter.sub_(direction * (group["fraction"] * length / direction.norm()))
