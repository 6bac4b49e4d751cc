"""mmcv's own convolution and linear types, made known to the pruning core by exact type.

``mmcv.cnn``'s wrappers compute what their torch bases do (they only mend empty batches in old releases); the adaptively
padded convolution of EfficientNet pads as TensorFlow's ``SAME`` does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from torch import Tensor, nn

from mmitp.pruning import MaskedConvTranspose2d, MaskedLayer, register_kind
from mmitp.pruning.layers import Conv2dKind, ConvTranspose2dKind, LinearKind
from mmitp.pruning.slim_layers import SlimConv2d, SlimLayer, conv_transpose_zeros, linear_zeros, zeros


class MaskedWrappedConv2d(MaskedLayer, wrappers.Conv2d, nn.Conv2d):
    """mmcv's ``Conv2d`` whose input channels carry a mask."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(*self.masked(x), self.bias)


class MaskedWrappedConvTranspose2d(MaskedLayer, wrappers.ConvTranspose2d, nn.ConvTranspose2d):
    """mmcv's ``ConvTranspose2d`` whose input channels carry a mask."""

    weight_in_dim = 0

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # mmcv's signature
        return MaskedConvTranspose2d.forward(self, x)


class MaskedWrappedLinear(MaskedLayer, wrappers.Linear, nn.Linear):
    """mmcv's ``Linear`` whose input features carry a mask."""

    input_dim = -1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(*self.masked(x), self.bias)


class MaskedConv2dAdaptivePadding(MaskedLayer, Conv2dAdaptivePadding, nn.Conv2d):
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


class SlimWrappedConv2d(SlimLayer, wrappers.Conv2d, nn.Conv2d):
    """mmcv's ``Conv2d`` with gather and scatter."""

    _nothing = SlimConv2d._nothing


class SlimWrappedConvTranspose2d(SlimLayer, wrappers.ConvTranspose2d, nn.ConvTranspose2d):
    """mmcv's ``ConvTranspose2d`` with gather and scatter."""

    kernel_size: Any
    stride: Any
    dilation: Any
    padding: Any
    output_padding: Any

    def _nothing(self, x: Tensor) -> Tensor:
        geometry = (self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation)
        return conv_transpose_zeros(x, self.out_width, *geometry)


class SlimWrappedLinear(SlimLayer, wrappers.Linear, nn.Linear):
    """mmcv's ``Linear`` with gather and scatter of features."""

    channel_dim = -1

    def _nothing(self, x: Tensor) -> Tensor:
        return linear_zeros(x, self.out_width)


class SlimConv2dAdaptivePadding(SlimLayer, Conv2dAdaptivePadding, nn.Conv2d):
    """mmcv's ``Conv2dAdaptivePadding`` with gather and scatter."""

    stride: tuple[int, int]

    def _nothing(self, x: Tensor) -> Tensor:
        size = [-(-s // stride) for s, stride in zip(x.shape[-2:], self.stride, strict=True)]
        return zeros(x, *x.shape[:-3], self.out_width, *size)


for _name in ("conv_transpose_zeros", "linear_zeros"):
    torch.fx.wrap(_name)  # the names of this module, for torch.fx


class AdaptivePaddingKind(Conv2dKind):
    dense = (Conv2dAdaptivePadding,)
    masked = MaskedConv2dAdaptivePadding


class WrappedConv2dKind(Conv2dKind):
    dense = (wrappers.Conv2d,)
    masked = MaskedWrappedConv2d


class WrappedConvTranspose2dKind(ConvTranspose2dKind):
    dense = (wrappers.ConvTranspose2d,)
    masked = MaskedWrappedConvTranspose2d


class WrappedLinearKind(LinearKind):
    dense = (wrappers.Linear,)
    masked = MaskedWrappedLinear


register_kind(AdaptivePaddingKind(), slim=SlimConv2dAdaptivePadding)
register_kind(WrappedConv2dKind(), slim=SlimWrappedConv2d)
register_kind(WrappedConvTranspose2dKind(), slim=SlimWrappedConvTranspose2d)
register_kind(WrappedLinearKind(), slim=SlimWrappedLinear)
