"""Camera, poses and polygons: camera coordinates are metres, x to the right, y down, z away from the viewer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

KITTI_SIZE = (1242, 375)
"""Width and height of a KITTI image, in pixels."""

# focal length and principal point as shares of the image's width and height
_KITTI_FOCAL = 721.54 / 1242
_KITTI_CX, _KITTI_CY = 609.56 / 1242, 172.85 / 375
CAMERA_HEIGHT = 1.65  # metres above the ground
NEAR = 0.4  # metres; polygons are cut at this plane
_ANGLES = np.arange(12) * (2 * math.pi / 12)
CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES), np.zeros(12)], axis=1)


@dataclass(frozen=True)
class Camera:
    """Pinhole camera looking along +z, x to the right, y down, as KITTI's rectified left colour camera.

    Args:
        width, height: image size in pixels.
    """

    width: int = KITTI_SIZE[0]
    height: int = KITTI_SIZE[1]

    @cached_property
    def focal(self) -> float:
        """Focal length in pixels: KITTI's 721.54 at a width of 1242."""
        return _KITTI_FOCAL * self.width

    @property
    def cx(self) -> float:
        return _KITTI_CX * self.width

    @property
    def cy(self) -> float:
        return _KITTI_CY * self.height

    @cached_property
    def _centre(self) -> np.ndarray:
        return np.array([self.cx, self.cy])

    def project(self, points: np.ndarray) -> np.ndarray:
        """Camera coordinates ``(..., 3)`` in metres to pixels ``(..., 2)``; z must be positive."""
        return points[..., :2] * (self.focal / points[..., 2:]) + self._centre

    def nearest_ground(self) -> float:
        """Distance in metres at which the ground leaves the image at the bottom."""
        return self.focal * CAMERA_HEIGHT / (self.height - 1 - self.cy)


@dataclass
class Pose:
    """Places a model (x forward, y up from the ground, z to its right) into the camera's coordinates."""

    x: float
    z: float
    rotation_y: float

    def __post_init__(self) -> None:
        c, s = math.cos(self.rotation_y), math.sin(self.rotation_y)
        self._matrix = np.array([[c, 0.0, -s], [0.0, -1.0, 0.0], [s, 0.0, c]])
        self._origin = np.array([self.x, CAMERA_HEIGHT, self.z])
        self.viewer = self._matrix @ -self._origin
        """The camera's place in model coordinates."""

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return points @ self._matrix + self._origin


def clip_near(points: np.ndarray) -> np.ndarray:
    """The part of a 3D polygon with z >= NEAR."""
    inside = points[:, 2] >= NEAR
    if inside.all():
        return points
    out = []
    for i, current in enumerate(points):
        previous = points[i - 1]
        if inside[i] != inside[i - 1]:
            t = (NEAR - previous[2]) / (current[2] - previous[2])
            out.append(previous + t * (current - previous))
        if inside[i]:
            out.append(current)
    return np.array(out).reshape(-1, 3)


def rectangle(pose: Pose, length: float, width: float) -> np.ndarray:
    half_l, half_w = length / 2, width / 2
    return pose(np.array([[half_l, 0, half_w], [half_l, 0, -half_w], [-half_l, 0, -half_w], [-half_l, 0, half_w]]))


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two rectangles on the ground ((4, 3) corners) overlap: separating axes."""
    (ax, _, az), (bx, _, bz) = ((a[0] + a[2]) / 2).tolist(), ((b[0] + b[2]) / 2).tolist()
    reach = (math.dist(a[0], a[2]) + math.dist(b[0], b[2])) / 2
    if math.hypot(ax - bx, az - bz) > reach:
        return False
    a2, b2 = a[:, [0, 2]], b[:, [0, 2]]
    for rect in (a2, b2):
        for edge in (rect[1] - rect[0], rect[2] - rect[1]):
            axis = np.array([-edge[1], edge[0]])
            pa, pb = a2 @ axis, b2 @ axis
            if pa.max() <= pb.min() or pb.max() <= pa.min():
                return False
    return True


def wrap_angle(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi
