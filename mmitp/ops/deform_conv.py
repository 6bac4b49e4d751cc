"""Modulated deformable convolution (DCNv2, Zhu et al. 2019) in plain torch, and the choice of the fastest way.

On the CPU a tap's bilinear sample is a weighted sum of four rows of the channels-last input, with the modulation inside
the weights: ``embedding_bag`` gathers whole channel vectors, and one matrix product follows. Rows are taken in blocks
that stay in the cache, and the backward pass computes them anew, so that memory holds no column matrix. Elsewhere one
``grid_sample`` over all taps does the sampling, for some images at a time, and again in the backward pass. Where the
operation is traced or exported it is that one operator for the whole batch. All are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Columns held at a time: 2 MiB in float32, but never fewer rows than keep the matrix product efficient.
_BLOCK_NUMBERS = 2**19
_BLOCK_ROWS = 512
# The same for grid_sample on accelerators: 256 MiB, but never less than an image's.
_IMAGE_NUMBERS = 2**26

_compiled_cuda: Callable[..., Tensor] | None = None


def register_compiled(function: Callable[..., Tensor] | None) -> None:
    """Make ``function`` (same arguments as :func:`modulated_deform_conv2d`) the implementation used on CUDA devices.

    The cores do not import mmcv, so :mod:`mmitp.compat` hands its compiled operator over here; None takes it back.
    """
    global _compiled_cuda
    _compiled_cuda = function


@dataclass(frozen=True)
class _Layout:
    """Sizes of one call, all in elements: input, kernel, geometry, groups and output."""

    n: int
    c: int
    h: int
    w: int
    o: int
    kh: int
    kw: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int
    ho: int
    wo: int

    @property
    def taps(self) -> int:
        return self.kh * self.kw

    def block(self) -> int:
        """Output positions whose columns are held at a time."""
        return max(_BLOCK_ROWS, _BLOCK_NUMBERS // (self.taps * self.c))

    def tap_positions(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Undisplaced row and column of every tap: ``(ho, taps)`` and ``(wo, taps)`` in input pixels."""

        def axis(length: int, stride: int, padding: int, taps: Tensor) -> Tensor:
            start = torch.arange(length, device=like.device) * stride - padding
            return (start[:, None] + taps[None]).to(like.dtype)

        taps_y = (torch.arange(self.kh, device=like.device) * self.dilation[0]).repeat_interleave(self.kw)
        taps_x = (torch.arange(self.kw, device=like.device) * self.dilation[1]).repeat(self.kh)
        return (
            axis(self.ho, self.stride[0], self.padding[0], taps_y),
            axis(self.wo, self.stride[1], self.padding[1], taps_x),
        )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def output_size(
    x: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> tuple[int, int]:
    """(Ho, Wo) of a convolution of ``x``, ``(N, C, H, W)``, by ``weight``, ``(O, C // groups, kh, kw)``."""
    sides = zip(x.shape[-2:], weight.shape[-2:], _pair(stride), _pair(padding), _pair(dilation), strict=True)
    ho, wo = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides)
    return ho, wo


def _layout(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
    deform_groups: int,
) -> _Layout:
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"x and weight must have four dimensions, got {tuple(x.shape)} and {tuple(weight.shape)}")
    n, c, h, w = x.shape
    o, c_group, kh, kw = weight.shape
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    if c % deform_groups or o % groups or c_group * groups != c:
        raise ValueError(
            f"weight {tuple(weight.shape)}, groups={groups} and deform_groups={deform_groups} "
            f"do not fit an input of {c} channels"
        )
    ho, wo = output_size(x, weight, stride, padding, dilation)
    if ho < 1 or wo < 1:
        raise ValueError(f"input of {h}x{w} is too small for this kernel: the output would be {ho}x{wo}")
    taps = deform_groups * kh * kw
    if tuple(offset.shape) != (n, 2 * taps, ho, wo):
        raise ValueError(f"offset must be {(n, 2 * taps, ho, wo)}, got {tuple(offset.shape)}")
    if mask is not None and tuple(mask.shape) != (n, taps, ho, wo):
        raise ValueError(f"mask must be {(n, taps, ho, wo)}, got {tuple(mask.shape)}")
    return _Layout(n, c, h, w, o, kh, kw, (sh, sw), (ph, pw), (dh, dw), groups, deform_groups, ho, wo)


def _by_grid_sample(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, lay: _Layout
) -> Tensor:
    """Sampling by one ``grid_sample`` over all taps: any device, and standard operators when exported."""
    taps, split, length = lay.taps, lay.n * lay.deform_groups, lay.ho * lay.wo
    base_y, base_x = lay.tap_positions(offset)
    delta = offset.reshape(split, taps, 2, lay.ho, lay.wo)
    # align_corners=False maps pixel p to (2p + 1) / size - 1, which also holds for a side of length one
    grid = torch.stack(
        (
            (delta[:, :, 1] + base_x.t()[:, None, :]) * (2 / lay.w) + (1 / lay.w - 1),
            (delta[:, :, 0] + base_y.t()[:, :, None]) * (2 / lay.h) + (1 / lay.h - 1),
        ),
        dim=-1,
    )
    columns = F.grid_sample(
        x.reshape(split, lay.c // lay.deform_groups, lay.h, lay.w),
        grid.view(split, taps * lay.ho, lay.wo, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    ).view(lay.n, lay.deform_groups, lay.c // lay.deform_groups, taps, length)
    if mask is not None:
        columns = columns * mask.reshape(lay.n, lay.deform_groups, 1, taps, length)
    matrix = weight.reshape(1, lay.groups, lay.o // lay.groups, -1).expand(lay.n, -1, -1, -1)
    out = matrix @ columns.reshape(lay.n, lay.groups, (lay.c // lay.groups) * taps, length)
    out = out.reshape(lay.n, lay.o, lay.ho, lay.wo)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def _by_images(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, lay: _Layout
) -> Tensor:
    """:func:`_by_grid_sample` for some images at a time; nothing but the arguments is kept for the backward pass."""
    arguments = (x, offset, mask, weight, bias)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    images = max(_IMAGE_NUMBERS // (lay.c * lay.taps * lay.ho * lay.wo), 1)
    masks = [None] * -(-lay.n // images) if mask is None else mask.split(images)
    parts = []
    for part, displacement, modulation in zip(x.split(images), offset.split(images), masks, strict=True):
        inputs = (part, displacement, modulation, weight, bias, replace(lay, n=len(part)))
        if learns:
            parts.append(checkpoint(_by_grid_sample, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_by_grid_sample(*inputs))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class _Samples:
    """Where and how much each tap reads; tensors are ``(n, ho, wo, taps, deform_groups)`` unless said otherwise."""

    rows: Tensor  # (..., 4) int32: the four neighbours as rows of the table
    weights: Tensor  # (..., 4): bilinear weights times modulation, zero outside of the input
    mask: Tensor | None
    upper: tuple[Tensor, Tensor]  # weight of the upper and the lower row, zero outside
    left: tuple[Tensor, Tensor]  # the same for the columns
    inside: tuple[Tensor, Tensor, Tensor, Tensor]  # upper, lower, left, right neighbour within the input


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Index, weight and validity of the two pixels around each position on an axis of ``size`` pixels."""
    low = position.floor()
    fraction = position - low
    low_in, high_in = (low >= 0) & (low < size), (low >= -1) & (low < size - 1)
    index = low.clamp(-2, size).int()  # far displacements would overflow an integer
    return (
        index.clamp(0, size - 1),
        (index + 1).clamp(0, size - 1),
        (1 - fraction).masked_fill(~low_in, 0),  # not a product: infinite displacements make the fraction NaN
        fraction.masked_fill(~high_in, 0),
        low_in,
        high_in,
    )


def _samples(offset: Tensor, mask: Tensor | None, lay: _Layout) -> _Samples:
    groups, taps = lay.deform_groups, lay.taps
    base_y, base_x = lay.tap_positions(offset)
    delta = offset.reshape(lay.n, groups, taps, 2, lay.ho, lay.wo).permute(3, 0, 4, 5, 2, 1).contiguous()
    y0, y1, wy0, wy1, in_y0, in_y1 = _neighbours(delta[0] + base_y.view(lay.ho, 1, taps, 1), lay.h)
    x0, x1, wx0, wx1, in_x0, in_x1 = _neighbours(delta[1] + base_x.view(lay.wo, taps, 1), lay.w)
    image = torch.arange(lay.n, dtype=torch.int32, device=offset.device).view(lay.n, 1, 1, 1, 1) * lay.h
    group = torch.arange(groups, dtype=torch.int32, device=offset.device)
    y0, y1 = (y0 + image) * (lay.w * groups), (y1 + image) * (lay.w * groups)
    x0, x1 = x0 * groups + group, x1 * groups + group
    m = None
    row0, row1 = wy0, wy1
    if mask is not None:
        m = mask.reshape(lay.n, groups, taps, lay.ho, lay.wo).permute(0, 3, 4, 2, 1).contiguous()
        row0, row1 = wy0 * m, wy1 * m
    return _Samples(
        rows=torch.stack((y0 + x0, y0 + x1, y1 + x0, y1 + x1), dim=-1),
        weights=torch.stack((row0 * wx0, row0 * wx1, row1 * wx0, row1 * wx1), dim=-1),
        mask=m,
        upper=(wy0, wy1),
        left=(wx0, wx1),
        inside=(in_y0, in_y1, in_x0, in_x1),
    )


def _table(x: Tensor, lay: _Layout) -> Tensor:
    """Channel vectors ``(n * h * w * deform_groups, c / deform_groups)``."""
    return x.permute(0, 2, 3, 1).contiguous().view(-1, lay.c // lay.deform_groups)


def _matrix(weight: Tensor, lay: _Layout) -> Tensor:
    """Weights as ``(groups, taps * c / groups, o / groups)``, in the order of the columns."""
    per_group = weight.reshape(lay.groups, lay.o // lay.groups, lay.c // lay.groups, lay.taps)
    return per_group.permute(0, 3, 2, 1).reshape(lay.groups, -1, lay.o // lay.groups)


def _group_columns(columns: Tensor, lay: _Layout) -> Tensor:
    """Columns ``(positions, taps, c)`` as ``(groups, positions, taps * c / groups)``."""
    return columns.view(-1, lay.taps, lay.groups, lay.c // lay.groups).permute(2, 0, 1, 3).flatten(2)


class _ByRows(torch.autograd.Function):
    """Sampling by weighted sums of table rows; nothing but the arguments is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        lay: _Layout,
    ) -> Tensor:
        ctx.save_for_backward(x, offset, mask, weight)
        ctx.lay = lay
        samples, table, matrix = _samples(offset, mask, lay), _table(x, lay), _matrix(weight, lay)
        out = x.new_empty(lay.n * lay.ho * lay.wo, lay.o)
        bags = lay.taps * lay.deform_groups
        rows, weights = samples.rows.view(-1, 4 * bags), samples.weights.view(-1, 4 * bags)
        starts = torch.arange(0, lay.block() * bags * 4, 4, dtype=torch.int32, device=x.device)
        for begin in range(0, out.shape[0], lay.block()):
            part = out[begin : begin + lay.block()]
            end = begin + part.shape[0]
            columns = F.embedding_bag(
                rows[begin:end].flatten(),
                table,
                starts[: part.shape[0] * bags],
                mode="sum",
                per_sample_weights=weights[begin:end].flatten(),
            )
            if lay.groups == 1:
                torch.mm(columns.view(-1, lay.taps * lay.c), matrix[0], out=part)
            else:
                product = torch.bmm(_group_columns(columns, lay), matrix)
                part.view(-1, lay.groups, lay.o // lay.groups).copy_(product.transpose(0, 1))
        out = out.view(lay.n, lay.ho, lay.wo, lay.o).permute(0, 3, 1, 2)
        return out if x.is_contiguous(memory_format=torch.channels_last) and lay.c > 1 else out.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, offset, mask, weight = ctx.saved_tensors
        lay: _Layout = ctx.lay
        with torch.autocast(x.device.type, enabled=False):
            return _rows_backward(x, offset, mask, weight, grad, lay, ctx.needs_input_grad)


def _rows_backward(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    grad: Tensor,
    lay: _Layout,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    samples, table, matrix = _samples(offset, mask, lay), _table(x, lay), _matrix(weight, lay)
    bags = lay.taps * lay.deform_groups
    rows, weights = samples.rows.view(-1, 4 * bags), samples.weights.view(-1, 4 * bags)
    starts = torch.arange(0, lay.block() * bags * 4, 4, dtype=torch.int32, device=x.device)
    need_x, need_weight, need_samples = needed[0], needed[3], needed[1] or needed[2]
    grad = grad.permute(0, 2, 3, 1).reshape(-1, lay.o)
    grad_table = torch.zeros_like(table) if need_x else None
    grad_matrix = torch.zeros_like(matrix) if need_weight else None
    grad_samples = torch.empty_like(weights) if need_samples else None
    for begin in range(0, rows.shape[0], lay.block()):
        part = grad[begin : begin + lay.block()]
        end = begin + part.shape[0]
        part_rows, part_weights = rows[begin:end].flatten(), weights[begin:end].flatten()
        part_grouped = part.view(-1, lay.groups, lay.o // lay.groups).transpose(0, 1)
        if need_x or need_samples:
            grad_columns = torch.bmm(part_grouped, matrix.transpose(1, 2))
            grad_columns = grad_columns.view(lay.groups, -1, lay.taps, lay.c // lay.groups).permute(1, 2, 0, 3)
            grad_columns = grad_columns.reshape(-1, lay.c // lay.deform_groups)
        if need_weight or need_samples:
            with torch.enable_grad():
                part_weights.requires_grad_(need_samples)
                columns = F.embedding_bag(
                    part_rows, table, starts[: part.shape[0] * bags], mode="sum", per_sample_weights=part_weights
                )
            if grad_samples is not None:
                grad_samples[begin:end] = torch.autograd.grad(columns, part_weights, grad_columns)[0].view(-1, 4 * bags)
            if grad_matrix is not None:
                grad_matrix.baddbmm_(_group_columns(columns.detach(), lay).transpose(1, 2), part_grouped)
        if grad_table is not None:
            corners, factors = part_rows.view(-1, 4), part_weights.detach().view(-1, 4)
            for corner in range(4):
                grad_table.index_add_(0, corners[:, corner], grad_columns * factors[:, corner : corner + 1])

    grad_x = grad_offset = grad_mask = grad_weight = None
    if grad_table is not None:
        grad_x = grad_table.view(lay.n, lay.h, lay.w, lay.c).permute(0, 3, 1, 2)
    if grad_matrix is not None:
        per_tap = grad_matrix.view(lay.groups, lay.taps, lay.c // lay.groups, lay.o // lay.groups)
        grad_weight = per_tap.permute(0, 3, 2, 1).reshape(weight.shape)
    if grad_samples is not None:
        g00, g01, g10, g11 = grad_samples.view(*samples.rows.shape).unbind(-1)
        (wy0, wy1), (wx0, wx1) = samples.upper, samples.left
        in_y0, in_y1, in_x0, in_x1 = samples.inside
        by_y0, by_y1 = g00 * wx0 + g01 * wx1, g10 * wx0 + g11 * wx1
        grad_y = by_y1 * in_y1 - by_y0 * in_y0
        grad_xpos = (g01 * wy0 + g11 * wy1) * in_x1 - (g00 * wy0 + g10 * wy1) * in_x0
        if samples.mask is not None:
            if needed[2]:
                grad_mask = (
                    (by_y0 * wy0 + by_y1 * wy1).permute(0, 4, 3, 1, 2).reshape(offset.shape[0], -1, lay.ho, lay.wo)
                )
            grad_y, grad_xpos = grad_y * samples.mask, grad_xpos * samples.mask
        if needed[1]:
            grad_offset = torch.stack((grad_y, grad_xpos)).permute(1, 5, 4, 0, 2, 3).reshape(offset.shape)
    return grad_x, grad_offset, grad_mask, grad_weight, None


def _by_rows(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, lay: _Layout
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        out = _ByRows.apply(x, offset, mask, weight, lay)
        return out if bias is None else out + bias.view(1, -1, 1, 1)


def _torchvision_op() -> Callable[..., Tensor] | None:
    """torchvision's operator, where torchvision has been imported and its library loaded."""
    return getattr(torch.ops.torchvision, "deform_conv2d", None)


def modulated_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Modulated deformable convolution with the semantics of mmcv and torchvision, by the fastest exact way.

    CPU: plain torch. CUDA: mmcv's compiled operator where there is one, else torchvision's, else plain torch. Lower
    precisions are computed in float32, also under autocast: positions in half precision would be off by pixels.

    Args:
        x: Input, ``(N, C, H, W)``, either memory format.
        offset: Displacement of every tap in pixels, ``(N, deform_groups * kh * kw * 2, Ho, Wo)``, channels ordered
            (y, x) for each tap of each deformable group.
        mask: Modulation of every tap, ``(N, deform_groups * kh * kw, Ho, Wo)``; None means all ones (DCNv1).
        weight: ``(O, C // groups, kh, kw)``.
        bias: ``(O,)`` or None.
        stride, padding, dilation: As in ``torch.nn.functional.conv2d``, in pixels.
        groups: Channel groups of the convolution.
        deform_groups: Channel groups with displacements of their own.

    Returns:
        ``(N, O, Ho, Wo)`` in the precision of ``x``. Samples are bilinear and count as zero outside of the input.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    lay = _layout(x, offset, mask, weight, stride, padding, dilation, groups, deform_groups)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    args = (
        x.to(dtype),
        offset.to(dtype),
        None if mask is None else mask.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if traced or x.numel() == 0:
        return _by_grid_sample_or_empty(*args, lay).to(x.dtype)
    if x.device.type == "cpu":
        return _by_rows(*args, lay).to(x.dtype)
    if x.device.type == "cuda" and _compiled_cuda is not None and mask is not None:
        return _compiled_cuda(*args, lay.stride, lay.padding, lay.dilation, groups, deform_groups).to(x.dtype)
    if x.device.type == "cuda" and (operator := _torchvision_op()) is not None:
        x_, offset_, mask_, weight_, bias_ = args
        out = operator(
            x_,
            weight_,
            offset_,
            x_.new_zeros(x_.shape[0], 1) if mask_ is None else mask_,
            x_.new_zeros(lay.o) if bias_ is None else bias_,
            *lay.stride,
            *lay.padding,
            *lay.dilation,
            groups,
            deform_groups,
            mask_ is not None,
        )
        return out.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _by_images(*args, lay).to(x.dtype)


def _by_grid_sample_or_empty(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, lay: _Layout
) -> Tensor:
    if x.numel():
        return _by_grid_sample(x, offset, mask, weight, bias, lay)
    # grid_sample takes no empty batch; the sum keeps every argument in the graph, so that all gradients are zeros
    parts = [t.sum() for t in (x, offset, mask, weight, bias) if t is not None]
    return x.new_zeros(lay.n, lay.o, lay.ho, lay.wo) + sum(parts) * 0
