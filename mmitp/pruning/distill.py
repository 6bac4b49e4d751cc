"""Self-distillation: a network that is being pruned also learns from what it was, or could be (ours).

The teacher costs one forward pass without gradient: an average of the weights over the last steps, or the same weights
with every mask on. The averaged network is there for the whole run; the open one only while masks train, since the
weights behind dropped channels learn nothing once they are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .layers import masked_layers


def distillation_loss(scores: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(scores / T))``, mean over the batch, in float32 (Hinton et al. 2015).

    The factor keeps the gradient's size whatever the temperature.

    Args:
        scores: the student's class scores (logits), ``(N, K)``.
        teacher: the teacher's, of the same shape; no gradient flows into them.
        temperature: ``T``, positive; the higher, the more the small probabilities count.

    Raises:
        ValueError: other shapes; a temperature that is not positive.

    Example:
        >>> import torch
        >>> from mmitp.pruning import distillation_loss
        >>> distillation_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), temperature=1)
        tensor(0.1308)
        >>> distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0]]))  # only differences count
        tensor(0.)
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive finite number, got {temperature!r}")
    if scores.dim() != 2 or scores.shape != teacher.shape:
        raise ValueError(
            f"distillation compares class scores of one shape (N, K), got {tuple(scores.shape)} of the student and "
            f"{tuple(teacher.shape)} of the teacher"
        )
    student = F.log_softmax(scores.float() / temperature, 1)
    target = F.log_softmax(teacher.detach().float() / temperature, 1)
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


@contextmanager
def open_masks(model: nn.Module) -> Iterator[None]:
    """The network for a while with every mask on that still trains, to be its own teacher.

    BatchNorm uses the batch in training mode, as ever, and leaves its running statistics alone: those are the masked
    network's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import distillation_loss, mask_model, open_masks
        >>> net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Flatten()))
        >>> net[1].prune_mask.data[:4] = -1
        >>> x = torch.randn(2, 3, 1, 1)
        >>> with open_masks(net), torch.no_grad():
        ...     teacher = net(x)
        >>> loss = distillation_loss(net(x), teacher)
        >>> bool(loss > 0)
        True
    """
    layers = [layer for layer in masked_layers(model).values() if not layer.mask_frozen]
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    patterns = [layer.prune_pattern for layer in layers]
    try:
        for layer in layers:
            # The buffer is put aside, not written to: nothing is copied and nothing waits for the device.
            layer.prune_pattern, layer.mask_frozen = torch.ones_like(layer.prune_pattern), True
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for layer, pattern in zip(layers, patterns, strict=True):
            layer.prune_pattern, layer.mask_frozen = pattern, False
        for norm in norms:
            norm.track_running_stats = True
