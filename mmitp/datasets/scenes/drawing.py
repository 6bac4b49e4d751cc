"""Polygons on an image, in OpenCV's fixed-point coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mmitp.datasets.scenes.geometry import Camera, clip_near

SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


def fixed_point(points: np.ndarray) -> np.ndarray:
    """Image coordinates in OpenCV's fixed-point format."""
    return np.rint(points.clip(-1e5, 1e5) * (1 << SHIFT)).astype(np.int32)


def fill_polygon(image: np.ndarray, points: np.ndarray, colour: Sequence[float]) -> None:
    cv2.fillConvexPoly(image, fixed_point(points), colour, cv2.LINE_AA, SHIFT)


def fill_ground(image: np.ndarray, camera: Camera, points: np.ndarray, colour: Sequence[float]) -> None:
    clipped = clip_near(points)
    if len(clipped) >= 3:
        fill_polygon(image, camera.project(clipped), colour)
