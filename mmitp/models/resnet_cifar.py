"""CIFAR residual networks (He et al., "Deep Residual Learning for Image Recognition", section 4.2).

A 3x3 stem with 16 channels, three stages of ``n`` basic blocks with 16, 32 and 64 channels, ``depth = 6n + 2``. The
network is a backbone: pooling and the classifier are mmpretrain's ``GlobalAveragePooling`` and ``LinearClsHead``.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmitp.engine.results import keep_inputs
from mmitp.engine.safe_load import load_data, saved_bytes
from mmitp.files import write_whole
from mmitp.pruning.layers import ChannelPad
from mmitp.registry import MODELS

__all__ = ["BasicBlockCifar", "ResNetCifar", "ShortcutA", "convert_resnet_cifar"]


class ShortcutA(ChannelPad):
    """Option A of He et al.: subsampled identity, new channels filled with zeros; no parameters, no multiplications.

    Output channel ``j`` is input channel ``j - front`` where that exists, else zero.

    Args:
        in_channels: channels of the stream that is read.
        out_channels: channels of the stream that is written, at least ``in_channels``.
        stride: every ``stride``-th row and column is kept.
        front: zero channels before the passed ones; by default half of the new channels, rounded down.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, front: int | None = None) -> None:
        super().__init__(in_channels, out_channels, front)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map N x in_channels x H x W to N x out_channels x ceil(H / stride) x ceil(W / stride)."""
        return super().forward(x[:, :, :: self.stride, :: self.stride])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}"


class BasicBlockCifar(BaseModule):
    """Two 3x3 convolutions and a shortcut, ReLU after the addition.

    Args:
        in_channels: channels of the input stream.
        out_channels: channels of both convolutions and of the output stream.
        stride: of the first convolution and the shortcut.
        shortcut: 'A' or 'B', used where the stream changes its shape (see :class:`ResNetCifar`).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = ShortcutA(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


@MODELS.register_module()
class ResNetCifar(BaseModule):
    """CIFAR residual network as an mmpretrain backbone.

    Args:
        depth: ``6n + 2``, for example 20, 32, 44, 56 or 110.
        shortcut: where a stage changes the stream's shape, 'A' subsamples and pads with zero channels (parameter-free,
            the paper's CIFAR networks), 'B' projects by a 1x1 convolution with batch normalisation.
        in_channels: channels of the image.
        base_channels: width of the first stage, where the later ones have twice and four times as many; or the widths
            of the three stages.
        init_cfg: mmengine initialisation; by default He's normal initialisation over the fan-in.

    Raises:
        ValueError: for a depth that is not ``6n + 2``, an unknown shortcut, or widths that are not three or that shrink
            under the shortcut 'A', which can only add channels.
    """

    def __init__(
        self,
        depth: int = 20,
        shortcut: str = "A",
        in_channels: int = 3,
        base_channels: int | Sequence[int] = 16,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"ResNetCifar: depth={depth} is not 6n + 2; use 20, 32, 44, 56 or 110, for example")
        if shortcut not in ("A", "B"):
            raise ValueError(f"ResNetCifar: shortcut={shortcut!r}; use 'A' (zero padding) or 'B' (projection)")
        if isinstance(base_channels, int):
            base_channels = (base_channels, 2 * base_channels, 4 * base_channels)
        widths = list(base_channels)
        if len(widths) != 3 or min(widths) < 1 or (shortcut == "A" and sorted(widths) != widths):
            raise ValueError(
                f"ResNetCifar: base_channels={base_channels!r}; use one number of channels or those of three stages, "
                "none fewer than before under shortcut='A'"
            )
        if init_cfg is None:
            init_cfg = [
                {"type": "Kaiming", "layer": "Conv2d", "mode": "fan_in"},
                {"type": "Constant", "layer": "BatchNorm2d", "val": 1.0},
            ]
        super().__init__(init_cfg)
        self.depth = depth
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks = (depth - 2) // 6
        stages, stream = [], widths[0]
        for width, stride in zip(widths, (1, 2, 2), strict=True):
            stages.append(
                nn.Sequential(
                    BasicBlockCifar(stream, width, stride, shortcut),
                    *(BasicBlockCifar(width, width, 1, shortcut) for _ in range(blocks - 1)),
                )
            )
            stream = width
        self.layer1, self.layer2, self.layer3 = stages

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Map images N x in_channels x H x W to a one-tuple with N x (last width) x ceil(H/4) x ceil(W/4)."""
        if torch.is_grad_enabled():
            # Channels last: a training step takes 0.78 of the time (CPU, batch 128, one thread, torch 2.13, AVX2).
            # Deployed, the caller chooses: one image through a slimmed network is slower so (AVX-512: 0.96 of the dense
            # network's time at half of its operations, 0.76 in the default layout), the dense one as fast.
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return (self.layer3(self.layer2(self.layer1(x))),)


def convert_resnet_cifar(checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """Rename a public CIFAR ResNet checkpoint's entries for mmpretrain's ``ImageClassifier`` over :class:`ResNetCifar`.

    The source is the widespread layout ``conv1, bn1, layer{1,2,3}.{block}.{conv1,bn1,conv2,bn2}, linear`` (option-A
    shortcuts), with or without ``DataParallel``'s ``module.`` and with or without a ``state_dict`` level. Key map::

        [module.]conv1.*, bn1.*, layerS.B.*  ->  backbone.conv1.*, backbone.bn1.*, backbone.layerS.B.*
        [module.]linear.*                    ->  head.fc.*

    Args:
        checkpoint: the loaded file.

    Returns:
        The state dict; tensors are shared with the source.

    Raises:
        ValueError: for a key outside that layout.
    """
    state = checkpoint.get("state_dict", checkpoint)
    assert isinstance(state, Mapping)
    converted = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        stem = name.split(".")[0]
        if not isinstance(value, Tensor) or stem not in ("conv1", "bn1", "layer1", "layer2", "layer3", "linear"):
            raise ValueError(
                f"key {key!r} does not belong to a CIFAR ResNet checkpoint: "
                "conv1, bn1, layer1 to layer3 and linear are expected"
            )
        converted["head.fc" + name.removeprefix("linear") if stem == "linear" else f"backbone.{name}"] = value
    return converted


def convert_resnet_cifar_file(source: str, target: str, trust: bool = False) -> None:
    """Write the converted checkpoint as ``{'state_dict': ...}`` (see :func:`convert_resnet_cifar`).

    Args:
        source: the public checkpoint.
        target: the file to write.
        trust: also read a source that may run code.

    Raises:
        ValueError: the source is missing, no checkpoint of tensors, or not of such a network; it is the target.
    """
    keep_inputs(target, source)
    try:
        checkpoint = load_data(source, "cpu", trust)
    except FileNotFoundError as error:
        raise ValueError(f"no checkpoint file {source!r}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} holds a {type(state).__name__}, not a checkpoint's state dict")
    absent = {"conv1.weight", "linear.weight"} - {str(key).removeprefix("module.") for key in state}
    if absent:
        raise ValueError(f"{source} lacks {', '.join(sorted(absent))}: it is no CIFAR ResNet's checkpoint")
    write_whole(target, saved_bytes({"state_dict": convert_resnet_cifar(checkpoint)}))
