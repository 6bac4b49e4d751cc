"""Layers of a slimmed network that read a part of their input, or write to a part of their output.

A layer that reads less than its input holds gathers; one that computes less than its output holds scatters into
zeros that nobody reads. One class a layer type.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# The functions below are steps of a network to torch.fx (torch.fx.wrap), and TorchScript compiles them.


def _channels_last(x: Tensor) -> bool:
    """Whether the layout is ``channels_last``; never for ONNX, which knows one layout and would transpose."""
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            return False
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def zeros(x: Tensor, *shape: int) -> Tensor:
    """Zeros of a shape, in the type and layout of ``x``."""
    return _zeros(x, list(shape))


def _zeros(x: Tensor, shape: list[int]) -> Tensor:
    out = x.new_zeros(shape)
    return out.contiguous(memory_format=torch.channels_last) if _channels_last(x) else out


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """``x.index_select(dim, index)`` that keeps ``channels_last``.

    ``index_select`` returns the default layout, and everything up to the next addition would stay in it: three times
    slower on the CPU where channels are few (a 3x3 convolution of 16 channels at 32x32, forward and backward). Along
    the last dimension in memory ``Tensor.gather`` is several times faster than ``index_select``, and so are the
    gradients of ``Tensor.scatter_``, which are such a gather.
    """
    if _channels_last(x):
        rows = x.permute(0, 2, 3, 1)
        return rows.gather(-1, _everywhere(index, rows)).permute(0, 3, 1, 2)
    return x.index_select(dim, index)


def scatter(x: Tensor, dim: int, index: Tensor, width: int) -> Tensor:
    """``x`` at the positions ``index`` of a tensor of ``width`` channels, zeros elsewhere, in the layout of ``x``."""
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export() and torch.jit.is_tracing():
            return _gather_into_places(x, dim, index, width)
    if _channels_last(x):
        rows = x.permute(0, 2, 3, 1)
        out = x.new_zeros([rows.shape[0], rows.shape[1], rows.shape[2], width])
        return out.scatter_(-1, _everywhere(index, rows), rows).permute(0, 3, 1, 2)
    shape = list(x.shape)
    shape[dim] = width
    return x.new_zeros(shape).index_copy_(dim, index, x)


def _gather_into_places(x: Tensor, dim: int, index: Tensor, width: int) -> Tensor:
    """:func:`scatter` for ONNX: one ``Gather``, with the first computed channel where nobody reads.

    ``index_copy_`` would be eight operators, ``ScatterElements`` among them, which some runtimes lack.
    """
    places = [0] * width
    for i, place in enumerate(index.tolist()):
        places[place] = i
    return x.index_select(dim, torch.tensor(places, device=x.device))


def _everywhere(index: Tensor, rows: Tensor) -> Tensor:
    """The index of the last dimension at every place of ``rows``, without memory of its own."""
    return index.expand(rows.shape[0], rows.shape[1], rows.shape[2], index.shape[0])


def conv_zeros(
    x: Tensor, width: int, pads: list[int], kernel: list[int], stride: list[int], dilation: list[int]
) -> Tensor:
    """Zeros of a 2d convolution's output shape and the input's layout, without the convolution.

    Args:
        x: the input, (N, C, H, W) or (C, H, W).
        width: output channels.
        pads: left, right, top and bottom, as ``F.pad`` takes them.
        kernel, stride, dilation: vertical and horizontal.
    """
    shape = list(x.shape)
    shape[-3] = width
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1) + 1
        shape[i - 2] = (x.shape[i - 2] + pads[2 - 2 * i] + pads[3 - 2 * i] - reach) // stride[i] + 1
    return _zeros(x, shape)


def conv_transpose_zeros(
    x: Tensor,
    width: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    extra: list[int],
    dilation: list[int],
) -> Tensor:
    """:func:`conv_zeros` of a transposed convolution; ``extra`` is its ``output_padding``."""
    shape = list(x.shape)
    shape[-3] = width
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1) + 1
        shape[i - 2] = (x.shape[i - 2] - 1) * stride[i] - 2 * padding[i] + reach + extra[i]
    return _zeros(x, shape)


def linear_zeros(x: Tensor, width: int) -> Tensor:
    """Zeros of a linear layer's output shape."""
    return x.new_zeros(list(x.shape[:-1]) + [width])


for _name in ("gather", "scatter", "conv_zeros", "conv_transpose_zeros", "linear_zeros"):
    torch.fx.wrap(_name)


class SlimLayer(nn.Module):
    """A layer behind a gather of its input channels and before a scatter of its output channels, where needed.

    The one of a layer type derives from it, the dense type and the dense type's bases, and takes the dense type's
    arguments by the same names; :func:`~mmitp.pruning.register_kind` makes it known.

    Attributes:
        in_index: buffer of input positions to read, or None to read the whole input.
        out_index: buffer of positions of the computed channels in an output of ``out_width`` channels, or None.
        empty: no reader keeps a channel of this layer: it gives zeros and computes nothing.
    """

    if TYPE_CHECKING:  # TorchScript cannot read annotations that are strings
        in_index: Tensor | None
        out_index: Tensor | None
        out_width: int
        empty: bool
    channel_dim = -3

    def wire(self, in_index: Tensor | None, out_index: Tensor | None, out_width: int) -> None:
        self.register_buffer("in_index", in_index)
        self.register_buffer("out_index", out_index)
        self.out_width = out_width
        self.channel_dim = type(self).channel_dim  # TorchScript sees attributes of the instance only
        self.empty = out_index is not None and len(out_index) == 0

    def unwire(self, bare: type[nn.Module]) -> None:
        """Turns the layer into its type without gather and scatter again: it takes and gives what it computes."""
        for name in ("in_index", "out_index"):
            del self._buffers[name]
        for name in ("out_width", "channel_dim", "empty"):
            del self.__dict__[name]
        for key, hook in list(self._forward_hooks.items()):
            if getattr(hook, "of_empty_layers", False):
                del self._forward_hooks[key]
        self.__class__ = bare  # type: ignore[assignment]  # the inverse of the class swap that wires it

    def read(self, x: Tensor) -> Tensor:
        """The channels of the input that the layer reads."""
        index = self.in_index
        return x if index is None else gather(x, self.channel_dim, index)

    def write(self, out: Tensor) -> Tensor:
        """The computed channels in their places."""
        index = self.out_index
        return out if index is None else scatter(out, self.channel_dim, index, self.out_width)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # by the dense type's name for it
            args = (kwargs.pop(next(iter(inspect.signature(super().forward).parameters))),)
        x, *args = args  # type: ignore[assignment]
        x = self.read(x)
        return self._nothing(x) if self.empty else self.write(super().forward(x, *args, **kwargs))

    def _nothing(self, x: Tensor) -> Tensor:
        """Zeros in the output's shape and the input's layout, at no cost."""
        raise NotImplementedError


class SlimConv2d(SlimLayer, nn.Conv2d, _ConvNd):
    """``nn.Conv2d`` with gather and scatter."""

    if TYPE_CHECKING:  # tuples, which TorchScript turns into the lists that functions declare
        kernel_size: Any
        stride: Any
        dilation: Any

    def forward(self, input: Tensor) -> Tensor:
        x = self.read(input)
        return self._nothing(x) if self.empty else self.write(self._conv_forward(x, self.weight, self.bias))

    def _nothing(self, x: Tensor) -> Tensor:
        pads = self._reversed_padding_repeated_twice
        return conv_zeros(x, self.out_width, pads, self.kernel_size, self.stride, self.dilation)


class SlimConvTranspose2d(SlimLayer, nn.ConvTranspose2d, _ConvTransposeNd):
    """``nn.ConvTranspose2d`` with gather and scatter."""

    if TYPE_CHECKING:  # tuples, which TorchScript turns into the lists that functions declare
        kernel_size: Any
        stride: Any
        dilation: Any
        padding: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self.read(input)
        extra = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        if self.empty:
            geometry = (self.kernel_size, self.stride, self.padding, extra, self.dilation)
            return conv_transpose_zeros(x, self.out_width, *geometry)
        out = F.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )
        return self.write(out)


class SlimLinear(SlimLayer, nn.Linear):
    """``nn.Linear`` with gather and scatter of features."""

    channel_dim = -1

    def forward(self, input: Tensor) -> Tensor:
        x = self.read(input)
        return linear_zeros(x, self.out_width) if self.empty else self.write(F.linear(x, self.weight, self.bias))
