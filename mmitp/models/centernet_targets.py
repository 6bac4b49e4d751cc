"""CenterNet's training targets: heat map, sizes, offsets and the cells that do not count. torch only.

Targets are made on the boxes' device without asking it for a value: every shape is known from the number of boxes, so
that a GPU never waits for the host, nor the host for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Heat-map cells of single boxes held at a time: 4 MiB, which stay in the cache.
_CELLS_AT_ONCE = 2**20


def centernet_gaussian_radius(sizes: Tensor, min_overlap: float = 0.7) -> Tensor:
    """The heat-map radius of CenterNet's code, in cells.

    It keeps CornerNet's original solution of the three quadratic equations (denominator 2 where the roots' is 2a),
    which mmdet has since corrected: the published results stem from this one.

    Args:
        sizes: heights and widths of the boxes in cells, shape (N, 2).
        min_overlap: IoU that a box moved by the radius should keep in that derivation.

    Returns:
        Whole numbers >= 0, shape (N,), floating point.
    """
    height, width = sizes.ceil().unbind(1)
    total, area = height + width, height * width
    one_in_one_out = (total + (total**2 - 4 * area * (1 - min_overlap) / (1 + min_overlap)).sqrt()) / 2
    inside = (2 * total + (4 * total**2 - 16 * (1 - min_overlap) * area).sqrt()) / 2
    linear = 2 * min_overlap * total
    outside = (-linear + (linear**2 + 16 * min_overlap * (1 - min_overlap) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(one_in_one_out, inside), outside).floor().clamp(min=0)


def _in_cells(boxes: Tensor, feat_shape: tuple[int, ...], img_shape: tuple[int, ...]) -> Tensor:
    """Boxes ``(..., 4)`` in input pixels as corners ``(..., 2, 2)``, x and y in cells of the map."""
    x, y = (boxes[..., 0::2] * (feat_shape[3] / img_shape[1]), boxes[..., 1::2] * (feat_shape[2] / img_shape[0]))
    return torch.stack([x, y], dim=-1)


def _draw(cell: Tensor, size: Tensor, usable: Tensor, group: Tensor, heatmap: Tensor) -> Tensor:
    """Draws Gaussians, sigma (2 radius + 1) / 6, zero beyond the radius, into ``heatmap``: the maximum where some meet.

    Args:
        cell: centres (x, y) of M boxes, (M, 2).
        size: their widths and heights in cells, (M, 2).
        usable: which of them are drawn, (M,).
        group: image * classes + class of each, (M,).
        heatmap: (N, classes, H, W), changed in place.
    """
    height, width = heatmap.shape[2:]
    radii = centernet_gaussian_radius(size.flip(1))[:, None]
    sigma = (2 * radii + 1) / 6
    lines = []
    for axis, length in ((1, height), (0, width)):
        distance = torch.arange(length, device=cell.device) - cell[:, axis, None]
        near = (distance.abs() <= radii) & usable[:, None]
        lines.append((-(distance**2) / (2 * sigma**2)).exp() * near)
    flat = heatmap.view(-1, height * width)
    step = max(_CELLS_AT_ONCE // (height * width), 1)
    for rows, columns, groups in zip(*(part.split(step) for part in (*lines, group)), strict=True):
        drawn = (rows[:, :, None] * columns[:, None, :]).flatten(1)
        flat.scatter_reduce_(0, groups[:, None].expand_as(drawn), drawn, "amax")
    return heatmap


def centernet_targets(
    gt_bboxes: list[Tensor],
    gt_labels: list[Tensor],
    feat_shape: tuple[int, ...],
    img_shape: tuple[int, ...],
) -> tuple[dict[str, Tensor], Tensor]:
    """Target maps for N images: all boxes of the batch at once.

    Args:
        gt_bboxes: N tensors (boxes, 4), input pixels.
        gt_labels: N tensors (boxes,), class indices.
        feat_shape: (N, classes, H, W) of the heat map.
        img_shape: height and width of the input.

    Returns:
        ``center_heatmap_target`` (N, classes, H, W), ``wh_target``, ``offset_target`` and
        ``wh_offset_target_weight`` (N, 2, H, W), and the number of positive cells, at least 1, as a 0-dim tensor.
    """
    batch, classes, height, width = feat_shape
    boxes, labels = torch.cat(gt_bboxes).float(), torch.cat(gt_labels).long()
    image = torch.cat([label.new_full((len(label),), i, dtype=torch.long) for i, label in enumerate(gt_labels)])
    corners = _in_cells(boxes, feat_shape, img_shape)
    size = corners[:, 1] - corners[:, 0]
    centre = corners.mean(dim=1)
    inside = (centre >= 0).all(1) & (centre[:, 0] < width) & (centre[:, 1] < height)
    usable = inside & (size > 0).all(1)
    # The others stay in the batch as boxes that leave no trace.
    size, centre = (torch.where(usable[:, None], value, 1) for value in (size, centre))
    cell = centre.floor()
    # Indexed by both, so that a label that is none of the classes is an error.
    group = torch.arange(batch * classes, device=labels.device).view(batch, -1)[image, labels]
    heatmap = _draw(cell, size, usable, group, boxes.new_zeros(batch, classes, height, width))

    x, y = cell.long().unbind(1)
    place = (image * height + y) * width + x
    # Of boxes with one cell the last counts; 0 where there is none. All write what that one has to say.
    number = torch.arange(1, len(boxes) + 1, device=boxes.device) * usable
    last = number.new_zeros(batch * height * width).scatter_reduce_(0, place, number, "amax")[place]
    of_box = torch.cat([size, centre - cell, torch.ones_like(size)], dim=1)
    of_cell = torch.cat([of_box.new_zeros(1, 6), of_box])[last]
    maps = boxes.new_zeros(3, batch, 2, height, width)
    maps[:, image, :, y, x] = of_cell.view(-1, 3, 2)
    targets = dict(
        center_heatmap_target=heatmap, wh_target=maps[0], offset_target=maps[1], wh_offset_target_weight=maps[2]
    )
    return targets, (heatmap == 1).sum().clamp(min=1)


def ignored_cells(
    ignored: Sequence[tuple[Tensor, Tensor] | None], heatmap: Tensor, img_shape: tuple[int, ...]
) -> Tensor:
    """A map like ``heatmap``: 1 in each cell that an ignored box touches, for the classes concerned, else 0.

    Args:
        ignored: for each of N images its boxes (regions, 4) in input pixels, and for each the class that it concerns or
            a negative number for all, (regions,); None: the image has no such box.
        heatmap: (N, classes, H, W).
        img_shape: height and width of the input.
    """
    _, classes, height, width = heatmap.shape
    none = heatmap.new_zeros(0, 4), heatmap.new_zeros(0, dtype=torch.long)
    regions = [none if image is None else (image[0].float(), image[1].long()) for image in ignored]
    # Short lists are filled up with boxes without area, which touch nothing.
    boxes, labels = (pad_sequence(list(parts), batch_first=True) for parts in zip(*regions, strict=True))
    corners = _in_cells(boxes, heatmap.shape, img_shape)
    starts, ends = corners[..., 0, :].floor(), corners[..., 1, :].ceil()
    columns, rows = (
        (at >= starts[..., axis, None]) & (at < ends[..., axis, None])
        for axis, at in enumerate(torch.arange(side, device=heatmap.device) for side in (width, height))
    )
    concerned = (labels[..., None] < 0) | (labels[..., None] == torch.arange(classes, device=heatmap.device))
    # How many boxes touch a cell: a product of ones and zeros, (N, classes, H, boxes) by (N, 1, boxes, W).
    rows_of_class = rows[:, :, None] & concerned[..., None]
    touching = rows_of_class.permute(0, 2, 3, 1).to(heatmap.dtype) @ columns[:, None].to(heatmap.dtype)
    return (touching > 0).to(heatmap.dtype)
