"""Greedy and soft non-maximum suppression in numpy, rule by rule those of mmcv's compiled operators."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: ``(N, 4)`` as x1, y1, x2, y2 in pixels.
        scores: ``(N,)``.
        iou_threshold: A box is dropped when its overlap with a kept one is *above* it.
        offset: 0 or 1, added to widths and heights.

    Returns:
        Kept indices (int64, on the device of ``boxes``) by descending score; ties keep the order of the input.
    """
    order = scores.detach().sort(descending=True, stable=True).indices.cpu().numpy()
    corners = boxes.detach().cpu().float().numpy()[order].T
    x1, y1, x2, y2 = np.ascontiguousarray(corners)
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    rest: np.ndarray = np.arange(order.size)
    keep = []
    with np.errstate(invalid="ignore", divide="ignore"):  # empty boxes: 0 / 0 counts as no overlap
        while rest.size:
            i, rest = rest[0], rest[1:]
            keep.append(order[i])
            width = np.minimum(x2[i], x2[rest]) - np.maximum(x1[i], x1[rest]) + offset
            height = np.minimum(y2[i], y2[rest]) - np.maximum(y1[i], y1[rest]) + offset
            inter = np.maximum(width, 0) * np.maximum(height, 0)
            rest = rest[~(inter / (area[i] + area[rest] - inter) > iou_threshold)]
    return torch.as_tensor(np.asarray(keep, dtype=np.int64), device=boxes.device)


def soft_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, method: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Soft non-maximum suppression (Bodla et al. 2017).

    Args:
        boxes: ``(N, 4)`` as x1, y1, x2, y2 in pixels.
        scores: ``(N,)``.
        iou_threshold: Overlap from which methods 0 and 1 act.
        sigma: Width of method 2.
        min_score: Boxes whose score falls below it are dropped.
        method: 0 hard, 1 linear (score times 1 - IoU), 2 Gaussian (score times exp(-IoU^2 / sigma)).
        offset: 0 or 1, added to widths and heights.

    Returns:
        ``(M, 5)`` kept boxes with their final scores, by descending score, and their ``(M,)`` indices.
    """
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.detach().cpu().float().numpy().T)
    score = scores.detach().cpu().float().numpy().copy()
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    rest = np.arange(score.size)
    keep: list[int] = []
    with np.errstate(invalid="ignore", divide="ignore"):
        while rest.size:
            best = int(score[rest].argmax())
            i = int(rest[best])
            keep.append(i)
            rest = np.delete(rest, best)
            width = np.minimum(x2[i], x2[rest]) - np.maximum(x1[i], x1[rest]) + offset
            height = np.minimum(y2[i], y2[rest]) - np.maximum(y1[i], y1[rest]) + offset
            inter = np.maximum(width, 0) * np.maximum(height, 0)
            iou = inter / (area[i] + area[rest] - inter)
            if method == 2:
                factor = np.exp(-(iou**2) / sigma)
            else:
                factor = np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0.0, 1.0)
            score[rest] *= factor.astype(score.dtype)
            rest = rest[~(score[rest] < min_score)]
    kept = torch.as_tensor(np.asarray(keep, dtype=np.int64))
    final = torch.from_numpy(np.stack([x1, y1, x2, y2, score], axis=1))[kept]
    return final.to(boxes.device), kept.to(boxes.device)
