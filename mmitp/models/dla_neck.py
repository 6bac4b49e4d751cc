"""CenterNet's up-sampling neck for DLA ("Objects as Points", Zhou et al., 2019)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmcv.ops import ModulatedDeformConv2dPack
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmitp.registry import MODELS

Config = dict[str, Any]


def bilinear_upsampling(channels: int, factor: int) -> nn.ConvTranspose2d:
    """A channel-wise transposed convolution that starts as bilinear up-sampling by an even ``factor``."""
    layer = nn.ConvTranspose2d(
        channels, channels, 2 * factor, stride=factor, padding=factor // 2, groups=channels, bias=False
    )
    centre = (2 * factor - 1 - factor % 2) / (2 * factor)
    line = 1 - (torch.arange(2 * factor) / factor - centre).abs()
    with torch.no_grad():
        layer.weight.copy_(line[:, None] * line[None, :])
    return layer


class _ConvNormRelu(nn.Module):
    """3x3 convolution with bias, BN, ReLU, under CenterNet's names."""

    def __init__(self, in_channels: int, out_channels: int, conv_cfg: Config | None, norm_cfg: Config) -> None:
        super().__init__()
        self.actf = nn.Sequential(build_norm_layer(norm_cfg, out_channels)[1], nn.ReLU(inplace=True))
        self.conv = build_conv_layer(conv_cfg, in_channels, out_channels, 3, stride=1, padding=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.actf(self.conv(x))


class _IterativeAggregation(nn.Module):
    """IDA: folds each map into its finer neighbour, ``y_i = node_i(up_i(proj_i(x_i)) + y_(i-1))``, with ``y_0 = x_0``.

    Args:
        in_channels: of the maps, finest first; the first has ``out_channels``.
        factors: how much finer map 0 is than map i.
    """

    def __init__(
        self,
        out_channels: int,
        in_channels: Sequence[int],
        factors: Sequence[int],
        conv_cfg: Config | None,
        norm_cfg: Config,
    ) -> None:
        super().__init__()
        self.stages = len(in_channels) - 1
        for i in range(1, len(in_channels)):
            self.add_module(f"proj_{i}", _ConvNormRelu(in_channels[i], out_channels, conv_cfg, norm_cfg))
            self.add_module(f"up_{i}", bilinear_upsampling(out_channels, factors[i]))
            self.add_module(f"node_{i}", _ConvNormRelu(out_channels, out_channels, conv_cfg, norm_cfg))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs = [maps[0]]
        for i in range(1, self.stages + 1):
            up = getattr(self, f"up_{i}")(getattr(self, f"proj_{i}")(maps[i]))
            outputs.append(getattr(self, f"node_{i}")(up + outputs[-1]))
        return outputs


class _HierarchicalUpsampling(nn.Module):
    """One aggregation a step, from the coarsest map to the finest: ``ida_0`` joins the last two, and so on."""

    def __init__(self, in_channels: Sequence[int], conv_cfg: Config | None, norm_cfg: Config) -> None:
        super().__init__()
        self.steps = len(in_channels) - 1
        for step in range(self.steps):
            # All maps coarser than the last target have been brought to its channels and stride by the step before.
            target, source = in_channels[-2 - step], in_channels[-1 - step]
            maps = [target] + [source] * (step + 1)
            aggregation = _IterativeAggregation(target, maps, [1] + [2] * (step + 1), conv_cfg, norm_cfg)
            self.add_module(f"ida_{step}", aggregation)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Takes and returns maps, finest first; the coarsest comes back as it is."""
        maps = list(maps)
        outputs = [maps[-1]]
        for step in range(self.steps):
            start = len(maps) - 2 - step
            maps[start:] = getattr(self, f"ida_{step}")(maps[start:])
            outputs.insert(0, maps[-1])
        return outputs


@MODELS.register_module()
class DLAUp(BaseModule):
    """The neck of CenterNet-DLA34: from the backbone's levels at strides 4 to 32 to one map at stride 4.

    Module names are CenterNet's (``dla_up.ida_0.proj_1.conv``, ``ida_up.node_2.actf``), see
    :func:`mmitp.models.checkpoints.convert_centernet_checkpoint`.

    Args:
        in_channels: of the backbone's levels, finest first.
        use_dcn: modulated deformable convolutions (DCNv2), as published, or plain 3x3 ones.
        norm_cfg: the normalisation to build.
        init_cfg: further initialisation.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 128, 256, 512),
        use_dcn: bool = True,
        norm_cfg: Config | None = None,
        init_cfg: Config | list[Config] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        conv_cfg = dict(type=ModulatedDeformConv2dPack) if use_dcn else None
        norm_cfg = norm_cfg or dict(type="BN")
        self.dla_up = _HierarchicalUpsampling(in_channels, conv_cfg, norm_cfg)
        # The coarsest map is left out: it went into the others without becoming finer itself.
        fine = in_channels[:-1]
        self.ida_up = _IterativeAggregation(in_channels[0], fine, [2**i for i in range(len(fine))], conv_cfg, norm_cfg)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        """One map (N, in_channels[0], H/4, W/4) from the backbone's levels at strides 4, 8, 16 and 32."""
        return (self.ida_up(self.dla_up(inputs)[:-1])[-1],)
