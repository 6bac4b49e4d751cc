"""Modulated deformable convolution (DCNv2, Zhu et al. 2019) in plain torch: one bilinear sampling over all taps, one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair


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
    """Modulated deformable convolution with the semantics of mmcv and torchvision.

    Args:
        x: Input, ``(N, C, H, W)``.
        offset: Displacement of every tap in pixels, ``(N, deform_groups * kh * kw * 2, Ho, Wo)``, channels ordered
            (y, x) for each tap of each deformable group.
        mask: Modulation of every tap, ``(N, deform_groups * kh * kw, Ho, Wo)``; None means all ones (DCNv1).
        weight: ``(O, C // groups, kh, kw)``.
        bias: ``(O,)`` or None.

    Returns:
        ``(N, O, Ho, Wo)``. Samples are bilinear and count as zero outside of the input.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    n, c, h, w = x.shape
    o, _, kh, kw = weight.shape
    taps = kh * kw
    ho = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    wo = (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    dtype, device = x.dtype, x.device
    tap_y = torch.arange(kh, device=device).mul(dh).sub(ph).repeat_interleave(kw)
    tap_x = torch.arange(kw, device=device).mul(dw).sub(pw).repeat(kh)
    base_y = (tap_y.view(-1, 1, 1) + torch.arange(ho, device=device).mul(sh).view(1, -1, 1)).to(dtype)
    base_x = (tap_x.view(-1, 1, 1) + torch.arange(wo, device=device).mul(sw).view(1, 1, -1)).to(dtype)
    delta = offset.reshape(n * deform_groups, taps, 2, ho, wo)
    # align_corners=False maps pixel p to (2p + 1) / size - 1, which also holds for a side of length one
    grid = torch.stack(
        ((delta[:, :, 1] + base_x) * (2 / w) + (1 / w - 1), (delta[:, :, 0] + base_y) * (2 / h) + (1 / h - 1)), dim=-1
    )
    columns = F.grid_sample(
        x.reshape(n * deform_groups, c // deform_groups, h, w),
        grid.view(n * deform_groups, taps * ho, wo, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    ).view(n, deform_groups, c // deform_groups, taps, ho * wo)
    if mask is not None:
        columns = columns * mask.reshape(n, deform_groups, 1, taps, ho * wo)
    out = weight.reshape(groups, o // groups, -1) @ columns.view(n, groups, (c // groups) * taps, ho * wo)
    out = out.reshape(n, o, ho, wo)
    return out if bias is None else out + bias.view(1, -1, 1, 1)
