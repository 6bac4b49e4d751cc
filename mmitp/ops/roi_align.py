"""RoIAlign (He et al. 2017) with average pooling in plain torch, equal to mmcv's compiled operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Sampled values held at a time (float32: 256 MiB), so that thousands of RoIs do not fill the memory.
_MAX_SAMPLES = 2**26


def _axis(start: Tensor, size: Tensor, pooled: int, samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Sampling positions along one axis in pixels, clamped to the map, and whether they lie within a pixel of it."""
    steps = (torch.arange(pooled * samples, device=start.device, dtype=start.dtype) + 0.5) / samples
    position = start[:, None] + steps * (size / pooled)[:, None]
    return position.clamp(0, length - 1), (position >= -1) & (position <= length)


def roi_align(
    x: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Average of bilinear samples in each bin of each region, differentiable in ``x``.

    Args:
        x: Feature map, ``(N, C, H, W)``.
        rois: ``(R, 5)`` as image index, x1, y1, x2, y2 in image pixels.
        output_size: Bins (height, width).
        spatial_scale: Feature pixels per image pixel.
        sampling_ratio: Samples a bin and axis; 0 takes as many as the bin has feature pixels, rounded up.
        aligned: Shift by half a pixel; False is the older convention, with regions at least one pixel wide.

    Returns:
        ``(R, C, *output_size)``.
    """
    c, h, w = x.shape[1:]
    bins_y, bins_x = output_size
    image = rois[:, 0].long()
    x1, y1, x2, y2 = (rois[:, 1:].to(x.dtype) * spatial_scale - (0.5 if aligned else 0.0)).unbind(1)
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = width.clamp(min=1), height.clamp(min=1)
    if sampling_ratio > 0:
        samples_y = samples_x = torch.full_like(image, sampling_ratio)
    else:
        samples_y, samples_x = (height / bins_y).ceil().long(), (width / bins_x).ceil().long()

    keys = torch.stack((image, samples_y, samples_x), dim=1)
    unique, group = torch.unique(keys, dim=0, return_inverse=True)
    pieces, indices = [], []
    for number, (b, ny, nx) in enumerate(unique.tolist()):
        members = torch.nonzero(group == number).flatten()
        indices.append(members)
        if ny <= 0 or nx <= 0:  # an empty region pools nothing
            pieces.append(x.new_zeros(members.numel(), c, bins_y, bins_x))
            continue
        chunks = []
        for part in members.split(max(1, _MAX_SAMPLES // (c * bins_y * bins_x * ny * nx))):
            r = part.numel()
            pos_y, valid_y = _axis(y1[part], height[part], bins_y, ny, h)
            pos_x, valid_x = _axis(x1[part], width[part], bins_x, nx, w)
            grid = torch.stack(
                (
                    ((2 * pos_x + 1) / w - 1)[:, None, :].expand(r, bins_y * ny, bins_x * nx),
                    ((2 * pos_y + 1) / h - 1)[:, :, None].expand(r, bins_y * ny, bins_x * nx),
                ),
                dim=-1,
            )
            sampled = F.grid_sample(
                x[b : b + 1],
                grid.reshape(1, r * bins_y * ny, bins_x * nx, 2),
                padding_mode="border",
                align_corners=False,
            ).view(c, r, bins_y * ny, bins_x * nx)
            valid = (valid_y[:, :, None] & valid_x[:, None, :]).to(x.dtype)
            pooled = (sampled * valid).view(c, r, bins_y, ny, bins_x, nx).mean(dim=(3, 5))
            chunks.append(pooled.transpose(0, 1))
        pieces.append(torch.cat(chunks))
    if not pieces:
        return x.sum() * x.new_zeros(0, c, bins_y, bins_x)
    return torch.cat(pieces)[torch.argsort(torch.cat(indices))]
