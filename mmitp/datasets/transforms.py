"""Image transforms that mmdet lacks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import cv2
import numpy as np
from mmcv.transforms import BaseTransform

from mmitp.registry import TRANSFORMS

__all__ = ["ScaleShiftCrop"]


@TRANSFORMS.register_module()
class ScaleShiftCrop(BaseTransform):
    """Scales an image to a fixed width, crops or pads it to a fixed height, and perturbs scale and position.

    CenterNet's preparation of KITTI (Zhou, Wang and Kraehenbuehl, "Objects as Points", 2019). Without perturbation the
    image is scaled by ``W / w``, the same on both axes, its top left corner stays in place, what goes beyond the
    height is cut and what lacks is filled: a prediction divided by ``scale_factor`` is in the image's own coordinates.
    With probability ``prob`` the window that is cut from the image is enlarged by ``1 + scale * n``, n ~ N(0, 1), kept
    within ``1 - scale`` and ``1 + scale``, and moved by ``shift * n`` of its width and height, kept within two standard
    deviations.

    Boxes are moved along and clipped; one without any area left is dropped, and one that keeps less than a quarter of
    its area is turned into an ignored one: too little of it is to be seen to train on, too much to call it background.

    Required keys: img, and optionally gt_bboxes (mmdet's boxes), gt_bboxes_labels, gt_ignore_flags.
    Modified: these, img_shape. Added: scale_factor (w, h), homography_matrix (3, 3), from original to new pixels.

    Args:
        size: width and height of the result in pixels.
        prob: probability of a perturbation, drawn from Python's generator, which data loaders seed in every worker; 0
            for testing, which draws nothing.
        scale: standard deviation and bound of the relative window size, in [0, 1).
        shift: standard deviation of the relative position.
        fill: value of pixels outside the image, in the image's channel order.

    Raises:
        ValueError: for arguments out of range.
    """

    MIN_VISIBLE = 0.25
    """Share of a box's area that must be left for it to be trained on."""

    def __init__(
        self,
        size: Sequence[int],
        prob: float = 0.0,
        scale: float = 0.4,
        shift: float = 0.1,
        fill: Sequence[float] = (0, 0, 0),
    ) -> None:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (width, height) in pixels, got {size!r}")
        if not 0 <= prob <= 1 or not 0 <= scale < 1 or shift < 0:
            raise ValueError(
                f"need 0 <= prob <= 1, 0 <= scale < 1 and shift >= 0, got prob={prob}, scale={scale}, shift={shift}"
            )
        self.size = (int(size[0]), int(size[1]))
        self.prob = prob
        self.scale = scale
        self.shift = shift
        self.fill = tuple(float(value) for value in fill)

    def transform(self, results: dict) -> dict:
        """See the class."""
        width, height = self.size
        base = width / results["img"].shape[1]
        zoom, move_x, move_y = self._draw()
        factor = base / zoom
        # The window's centre in the image; without perturbation the window starts at the image's corner.
        centre_x = width / base * (0.5 + move_x)
        centre_y = height / base * (0.5 + move_y)
        offset_x, offset_y = width / 2 - factor * centre_x, height / 2 - factor * centre_y
        matrix = np.array([[factor, 0.0, offset_x], [0.0, factor, offset_y], [0.0, 0.0, 1.0]])

        # Boxes live in continuous coordinates, in which pixel i covers i to i + 1; the warp addresses pixel centres.
        half = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
        results["img"] = cv2.warpAffine(
            results["img"],
            (np.linalg.inv(half) @ matrix @ half)[:2],
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=self.fill,
        )
        results["img_shape"] = (height, width)
        results["scale_factor"] = (factor, factor)
        results["homography_matrix"] = matrix.astype(np.float32)
        if results.get("gt_bboxes") is not None:
            self._move_boxes(results, factor, (offset_x, offset_y))
        return results

    def _draw(self) -> tuple[float, float, float]:
        """Relative size of the window and its relative displacement."""
        # A test (prob 0) draws nothing: without workers it would move the training's random sequence.
        if self.prob == 0 or random.random() >= self.prob:
            return 1.0, 0.0, 0.0
        zoom = 1.0 + min(1.0, max(-1.0, random.gauss(0, 1))) * self.scale
        moves = [min(2.0, max(-2.0, random.gauss(0, 1))) * self.shift for _ in range(2)]
        return zoom, moves[0], moves[1]

    def _move_boxes(self, results: dict, factor: float, offset: tuple[float, float]) -> None:
        boxes = results["gt_bboxes"].clone()
        boxes.rescale_((factor, factor))
        boxes.translate_(offset)
        whole = boxes.areas.numpy()
        boxes.clip_(results["img_shape"])
        left = boxes.areas.numpy()
        flags = np.asarray(results.get("gt_ignore_flags", np.zeros(len(whole))), dtype=bool)
        flags = flags | (left < self.MIN_VISIBLE * whole)
        keep = left > 0
        results["gt_bboxes"] = boxes[keep]
        results["gt_ignore_flags"] = flags[keep]
        if "gt_bboxes_labels" in results:
            results["gt_bboxes_labels"] = results["gt_bboxes_labels"][keep]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(size={self.size}, prob={self.prob}, scale={self.scale}, shift={self.shift}, "
            f"fill={self.fill})"
        )
