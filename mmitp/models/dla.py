"""The DLA-34 backbone of "Deep Layer Aggregation" (Yu et al., CVPR 2018)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmitp.models.checkpoints import dla_state_dict
from mmitp.registry import MODELS

Config = dict[str, Any]

# depth: (blocks a level as the depth of its tree, channels a level)
_ARCHITECTURES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    34: ((1, 1, 1, 2, 2, 1), (16, 32, 64, 128, 256, 512)),
}


def _conv(conv_cfg: Config | None, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Module:
    return build_conv_layer(conv_cfg, in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


def _norm(norm_cfg: Config, channels: int) -> nn.Module:
    return build_norm_layer(norm_cfg, channels)[1]


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions; the tree that holds the block hands the residual in."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, conv_cfg: Config | None, norm_cfg: Config
    ) -> None:
        super().__init__()
        self.conv1 = _conv(conv_cfg, in_channels, out_channels, 3, stride)
        self.bn1 = _norm(norm_cfg, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(conv_cfg, out_channels, out_channels, 3)
        self.bn2 = _norm(norm_cfg, out_channels)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + residual)


class _Root(nn.Module):
    """Aggregates the children of a tree: concatenation, 1x1 convolution, BN, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, conv_cfg: Config | None, norm_cfg: Config) -> None:
        super().__init__()
        self.conv = _conv(conv_cfg, in_channels, out_channels, 1)
        self.bn = _norm(norm_cfg, out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, children: Sequence[Tensor]) -> Tensor:
        return self.relu(self.bn(self.conv(torch.cat(list(children), dim=1))))


class _Tree(nn.Module):
    """A tree of ``depth`` levels: two sub-trees (or blocks) and a root over them and all ``children`` handed in.

    With ``level_root`` the (down-sampled) input of the tree is a child as well. In a tree deeper than one level the
    projected residual is not used, since the inner tree makes its own: ``project`` then exists and runs because the
    published weights have it and the published operation counts include it, but it gets no gradient, so its
    parameters are frozen (a distributed wrapper otherwise waits for their gradients for ever).
    """

    def __init__(
        self,
        depth: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        conv_cfg: Config | None,
        norm_cfg: Config,
        level_root: bool = False,
        child_channels: int = 0,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.level_root = level_root
        if level_root:
            child_channels += in_channels
        self.downsample = nn.MaxPool2d(stride, stride) if stride > 1 else nn.Identity()
        self.project: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.project = nn.Sequential(_conv(conv_cfg, in_channels, out_channels, 1), _norm(norm_cfg, out_channels))
        if depth == 1:
            self.tree1: nn.Module = _BasicBlock(in_channels, out_channels, stride, conv_cfg, norm_cfg)
            self.tree2: nn.Module = _BasicBlock(out_channels, out_channels, 1, conv_cfg, norm_cfg)
            self.root = _Root(2 * out_channels + child_channels, out_channels, conv_cfg, norm_cfg)
        else:
            self.project.requires_grad_(False)
            self.tree1 = _Tree(depth - 1, in_channels, out_channels, stride, conv_cfg, norm_cfg)
            self.tree2 = _Tree(
                depth - 1,
                out_channels,
                out_channels,
                1,
                conv_cfg,
                norm_cfg,
                child_channels=child_channels + out_channels,
            )

    def forward(self, x: Tensor, children: Sequence[Tensor] = ()) -> Tensor:
        bottom = self.downsample(x)
        residual = self.project(bottom)
        if self.level_root:
            children = [*children, bottom]
        if self.depth > 1:
            return self.tree2(x1 := self.tree1(x), [*children, x1])
        x1 = self.tree1(x, residual)
        return self.root([self.tree2(x1, x1), x1, *children])


@MODELS.register_module()
class DLA(BaseModule):
    """Deep Layer Aggregation: levels 0-5 at strides 1, 2, 4, 8, 16, 32.

    Module names and parameter counts are those of the published ImageNet weights (``dla34-ba72cf86.pth``), which load
    through ``init_cfg=dict(type='Pretrained', checkpoint='path/to/dla34-ba72cf86.pth')``; the backbone of a CenterNet
    checkpoint loads in the same way. Random weights follow the paper's code: normal with variance 2 / (kernel area x
    output channels).

    Args:
        depth: 34.
        width: factor on every channel number; 1 is the published network, 0.25 the smallest useful one.
        channels: of the levels 0 to 5 one by one, in place of ``width``.
        out_indices: the levels to return.
        conv_cfg: the convolution to build, ``nn.Conv2d`` if None.
        norm_cfg: the normalisation to build.
        init_cfg: further initialisation; of the type ``Pretrained`` it names a local file or an address. If that
            cannot be read (the weights' own server is down), the weights stay random and the log says so.

    Raises:
        ValueError: an unknown depth or level, a width that leaves no whole channel number, or a checkpoint of another
            network.
    """

    def __init__(
        self,
        depth: int = 34,
        width: float = 1.0,
        out_indices: Sequence[int] = (2, 3, 4, 5),
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = None,
        init_cfg: Config | list[Config] | None = None,
        channels: Sequence[int] | None = None,
    ) -> None:
        if depth not in _ARCHITECTURES:
            raise ValueError(f"DLA: depth must be one of {sorted(_ARCHITECTURES)}, got {depth}")
        tree_depths, full_channels = _ARCHITECTURES[depth]
        if channels is None:
            channels = [round(channel * width) for channel in full_channels]
            if min(channels) < 1 or any(n != full * width for n, full in zip(channels, full_channels, strict=True)):
                raise ValueError(
                    f"DLA: width {width} times the channels {full_channels} must give whole positive numbers; "
                    "try 0.25, 0.5 or 1, or give the channels one by one"
                )
        elif width != 1 or len(channels) != len(full_channels) or min(channels) < 1:
            raise ValueError(
                f"DLA: channels must be {len(full_channels)} positive numbers, one a level, and then width stays 1; "
                f"got channels={tuple(channels)}, width={width}"
            )
        if not out_indices or not set(out_indices) <= set(range(len(channels))):
            raise ValueError(f"DLA: out_indices must be levels from 0 to {len(channels) - 1}, got {tuple(out_indices)}")
        given = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
        self.pretrained = [cfg["checkpoint"] for cfg in given if cfg["type"] == "Pretrained"]
        super().__init__(
            init_cfg=[
                dict(type="Kaiming", layer="Conv2d", mode="fan_out", nonlinearity="relu", distribution="normal"),
                dict(type="Constant", layer="_BatchNorm", val=1),
                *(cfg for cfg in given if cfg["type"] != "Pretrained"),
            ]
        )
        norm_cfg = norm_cfg or dict(type="BN")
        self.out_indices = tuple(out_indices)
        self.channels = tuple(channels)

        def plain_level(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                _conv(conv_cfg, in_channels, out_channels, kernel, stride),
                _norm(norm_cfg, out_channels),
                nn.ReLU(inplace=True),
            )

        self.base_layer = plain_level(3, channels[0], 7)
        self.level0 = plain_level(channels[0], channels[0], 3)
        self.level1 = plain_level(channels[0], channels[1], 3, stride=2)
        for level in range(2, len(channels)):
            tree = _Tree(
                tree_depths[level],
                channels[level - 1],
                channels[level],
                stride=2,
                conv_cfg=conv_cfg,
                norm_cfg=norm_cfg,
                level_root=level > 2,
            )
            self.add_module(f"level{level}", tree)

    def init_weights(self) -> None:
        """Random weights, then the pretrained ones that ``init_cfg`` names, if they can be read."""
        first_call = not self.is_init
        super().init_weights()
        if first_call:
            for path in self.pretrained:
                self._load_pretrained(path)

    def _load_pretrained(self, path: str) -> None:
        try:
            checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
        except OSError as error:
            print_log(
                f"DLA keeps its random weights: the checkpoint '{path}' cannot be read ({error})",
                logger="current",
                level=logging.WARNING,
            )
            return
        state = dla_state_dict(checkpoint)
        # Masks and counters may be absent; whatever shapes the network's function may not.
        needed = ("weight", "bias", "running_mean", "running_var")
        for key, value in self.state_dict().items():
            if key.rpartition(".")[2] not in needed:
                continue
            if key not in state:
                raise ValueError(f"{path} is not a checkpoint of DLA-34: it has no '{key}'")
            if state[key].shape != value.shape:
                raise ValueError(
                    f"{path}: '{key}' has the shape {tuple(state[key].shape)}, this network needs "
                    f"{tuple(value.shape)}; published weights fit width=1 only"
                )
        self.load_state_dict(state, strict=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Levels ``out_indices``, level i at stride 2**i, of images (N, 3, H, W); H and W are multiples of 32."""
        x = self.base_layer(x)
        outputs = []
        for level in range(len(self.channels)):
            x = getattr(self, f"level{level}")(x)
            if level in self.out_indices:
                outputs.append(x)
        return tuple(outputs)
