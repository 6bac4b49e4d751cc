"""mmcv's own convolution and linear types, made known to the pruning core by exact type.

``mmcv.cnn``'s wrappers compute what their torch bases do (they only mend empty batches in old releases); the adaptively
padded convolution of EfficientNet pads as TensorFlow's ``SAME`` does.
"""

from __future__ import annotations

import torch.nn.functional as F
from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from torch import Tensor

from mmitp.pruning import MaskedLayer, register_kind
from mmitp.pruning.layers import Conv2dKind, ConvTranspose2dKind, LinearKind
from mmitp.pruning.slim import SlimConv2d, SlimConvTranspose2d, SlimLayer, SlimLinear, register_slim, zeros


class MaskedConv2dAdaptivePadding(MaskedLayer, Conv2dAdaptivePadding):
    """mmcv's ``Conv2dAdaptivePadding`` whose input channels carry a mask."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        x, weight = self.masked(x)
        return F.conv2d(F.pad(x, pads), weight, self.bias, self.stride, 0, self.dilation, self.groups)


class SlimConv2dAdaptivePadding(SlimLayer, Conv2dAdaptivePadding):
    """mmcv's ``Conv2dAdaptivePadding`` with gather and scatter."""

    stride: tuple[int, int]

    def _nothing(self, x: Tensor) -> Tensor:
        size = [-(-s // stride) for s, stride in zip(x.shape[-2:], self.stride, strict=True)]
        return zeros(x, *x.shape[:-3], self.out_width, *size)


class AdaptivePaddingKind(Conv2dKind):
    dense = (Conv2dAdaptivePadding,)
    masked = MaskedConv2dAdaptivePadding


class WrappedConv2dKind(Conv2dKind):
    dense = (wrappers.Conv2d,)


class WrappedConvTranspose2dKind(ConvTranspose2dKind):
    dense = (wrappers.ConvTranspose2d,)


class WrappedLinearKind(LinearKind):
    dense = (wrappers.Linear,)


for _kind in (AdaptivePaddingKind(), WrappedConv2dKind(), WrappedConvTranspose2dKind(), WrappedLinearKind()):
    register_kind(_kind)
register_slim(Conv2dAdaptivePadding, SlimConv2dAdaptivePadding)
register_slim(wrappers.Conv2d, SlimConv2d)
register_slim(wrappers.ConvTranspose2d, SlimConvTranspose2d)
register_slim(wrappers.Linear, SlimLinear)
