"""The modulated deformable convolution (DCNv2) as a layer the pruning core can mask, count and slim.

One mask serves the whole layer: the offset convolution reads the same input, so a channel that only it read could
never leave the network. All taps of an output position move together for every channel (one deformable group), which
makes dropping a channel exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d, ModulatedDeformConv2dPack
from torch import Tensor

from mmitp.ops import modulated_deform_conv2d
from mmitp.pruning import MaskedLayer, register_kind
from mmitp.pruning.layers import Conv2dKind, CountedKind
from mmitp.pruning.slim_layers import SlimLayer, zeros


class MaskedDCNv2(MaskedLayer, ModulatedDeformConv2dPack, ModulatedDeformConv2d):
    """mmcv's ``DCNv2`` whose input channels carry a mask; keys and shapes are those of the base."""

    conv_offset: Any
    bias: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    deform_groups: Any

    def forward(self, x: Tensor) -> Tensor:
        weight, offset_weight = self.weight, self.conv_offset.weight
        if self.masks_input(x, weight.numel() + offset_weight.numel()):
            x = self.masked_input(x)
        else:
            weight = self.masked_weight()
            if self.mask_granularity == "channel":
                offset_weight = self._mask(offset_weight, 1)
        geometry = (self.stride, self.padding, self.dilation)
        out = F.conv2d(x, offset_weight, self.conv_offset.bias, *geometry)
        y, x_offset, modulation = torch.chunk(out, 3, dim=1)
        return modulated_deform_conv2d(
            x,
            torch.cat((y, x_offset), dim=1),
            torch.sigmoid(modulation),
            weight,
            self.bias,
            *geometry,
            self.groups,
            self.deform_groups,
        )

    def fold(self) -> None:
        if self.mask_granularity == "channel":
            with torch.no_grad():
                self.conv_offset.weight.mul_(self.binary_mask().view(1, -1, 1, 1))
        super().fold()


class SlimDCNv2(SlimLayer, ModulatedDeformConv2dPack, ModulatedDeformConv2d):
    """mmcv's ``DCNv2`` with gather and scatter."""

    padding: Any
    dilation: Any
    kernel_size: Any
    stride: Any

    def _nothing(self, x: Tensor) -> Tensor:
        geometry = zip(x.shape[-2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        size = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in geometry]
        return zeros(x, *x.shape[:-3], self.out_width, *size)


def offset_macs(layer: Any, out: Tensor) -> int:
    """MACs that an input channel costs the offset convolution."""
    weight = layer.conv_offset.weight
    return int(weight.shape[0] * weight[0, 0].numel() * (out.numel() // out.shape[1]))


class DCNv2Kind(Conv2dKind):
    """Counts the deformable product and the offset convolution; several deformable groups stay dense."""

    dense = (ModulatedDeformConv2dPack,)
    masked = MaskedDCNv2

    def can_mask(self, layer: Any) -> bool:
        return not self.whole(layer)

    def whole(self, layer: Any) -> bool:
        return int(layer.groups) != 1 or int(layer.deform_groups) != 1

    def input_macs(self, layer: Any, x: Tensor, out: Tensor) -> int:
        return offset_macs(layer, out)

    def slice(self, layer: Any, in_keep: Tensor, out_keep: Tensor) -> None:
        super().slice(layer, in_keep, out_keep)
        offset = layer.conv_offset
        super().slice(offset, in_keep, torch.arange(offset.out_channels, device=in_keep.device))


class GivenOffsetsKind(CountedKind):
    """Deformable convolutions whose offsets come from elsewhere: counted, dense."""

    dense = (DeformConv2d, ModulatedDeformConv2d)

    def pair_macs(self, layer: Any, x: Tensor, out: Tensor) -> int:
        if type(layer) is ModulatedDeformConv2d:
            return super().pair_macs(layer, x, out)
        # mmcv enlarges maps smaller than the kernel, and cuts the surplus off the output.
        missing = [max(k - s, 0) for k, s in zip(layer.kernel_size, x.shape[-2:], strict=True)]
        positions = out.shape[0] * (out.shape[-2] + missing[0]) * (out.shape[-1] + missing[1])
        return int(layer.weight[0, 0].numel()) * positions


class DCNv1Kind(CountedKind):
    """The deformable convolution without modulation: counted with its offset convolution, dense."""

    dense = (DeformConv2dPack,)

    def input_macs(self, layer: Any, x: Tensor, out: Tensor) -> int:
        return offset_macs(layer, out)


register_kind(DCNv2Kind(), slim=SlimDCNv2)
register_kind(GivenOffsetsKind())
register_kind(DCNv1Kind())
