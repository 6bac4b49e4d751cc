"""The road, and everything that lies behind the objects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from mmitp.datasets.scenes.drawing import fill_ground, fill_polygon
from mmitp.datasets.scenes.geometry import CAMERA_HEIGHT, Camera
from mmitp.datasets.scenes.mesh import Light, bgr, pick


@dataclass
class Road:
    """A straight road seen from its own lane: heading (radians) and the lateral position of its edges (metres)."""

    heading: float
    left: float
    right: float
    lane: float

    def to_camera(self, along: float | np.ndarray, across: float | np.ndarray) -> tuple[float, float]:
        c, s = math.cos(self.heading), math.sin(self.heading)
        return across * c + along * s, along * c - across * s  # type: ignore[return-value]

    def quad(self, s0: float, s1: float, t0: float, t1: float) -> np.ndarray:
        corners = [self.to_camera(s, t) for s, t in ((s0, t0), (s0, t1), (s1, t1), (s1, t0))]
        return np.array([[x, CAMERA_HEIGHT, z] for x, z in corners])


@lru_cache(maxsize=8)
def _ground_grid(camera: Camera) -> tuple[np.ndarray, np.ndarray, int]:
    """Ground coordinates (x, z in metres) of the pixels of the rows below the horizon, and the first such row."""
    first = math.floor(camera.cy) + 1
    rows = np.arange(first, camera.height, dtype=np.float32)[:, None]
    z = camera.focal * CAMERA_HEIGHT / (rows - camera.cy)
    x = (np.arange(camera.width, dtype=np.float32)[None] - camera.cx) * z / camera.focal
    return x.astype(np.float32), np.broadcast_to(z, x.shape).astype(np.float32), first


def background(camera: Camera, light: Light, road: Road, rng: np.random.Generator) -> np.ndarray:
    """Sky, far skyline, ground, road and its markings."""
    height, width = camera.height, camera.width
    image = np.empty((height, width, 3), np.float32)
    horizon = camera.cy
    ramp = np.clip(np.arange(height, dtype=np.float32) / horizon, 0, 1)[:, None, None]
    cover = rng.random()
    top = (bgr(235, 160, 95) * (1 - cover) + bgr(215, 210, 205) * cover) * rng.uniform(0.75, 1.1)
    image[:] = top * (1 - ramp) + np.array(light.haze) * ramp
    clouds = cv2.resize(rng.random((6, 14), dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    image += (np.clip(clouds - 0.45, 0, 1) * rng.uniform(0, 120))[..., None]

    ground = pick(rng, [bgr(60, 100, 85), bgr(55, 85, 75), bgr(105, 115, 120), bgr(80, 110, 125)])
    asphalt = bgr(100, 100, 100) * rng.uniform(0.65, 1.3) + rng.uniform(-5, 5, 3)
    pavement = bgr(135, 140, 145) * rng.uniform(0.8, 1.15)
    up = (0.0, -1.0, 0.0)
    canvas = np.clip(image, 0, 255).astype(np.uint8)
    cv2.rectangle(canvas, (0, int(horizon)), (width, height), light.shade(ground, up, 15.0), -1)

    steps = 48
    line = horizon - camera.focal * np.abs(np.interp(np.linspace(0, 9, steps), np.arange(10), rng.uniform(0, 0.06, 10)))
    line -= rng.uniform(0, 0.006, steps) * camera.focal
    xs = np.linspace(-1, width, steps)
    far = light.shade(pick(rng, [bgr(50, 80, 60), bgr(120, 120, 115)]), up, 0.6 * light.haze_distance)
    for i in range(steps - 1):
        quad = np.array([[xs[i], line[i]], [xs[i + 1], line[i + 1]], [xs[i + 1], horizon + 1], [xs[i], horizon + 1]])
        tone = rng.uniform(0.9, 1.1)
        fill_polygon(canvas, quad, [channel * tone for channel in far])

    far_end, near_end = 220.0, -2.0
    walk = rng.uniform(1.5, 4.0)
    kerb = light.shade(pavement * 1.25, up, 10.0)
    bands = [
        (road.left - walk, road.left, light.shade(pavement, up, 10.0)),
        (road.right, road.right + walk, light.shade(pavement, up, 10.0)),
        (road.left, road.right, light.shade(asphalt, up, 10.0)),
        (road.left - 0.15, road.left, kerb),
        (road.right, road.right + 0.15, kerb),
    ]
    for t0, t1, colour in bands:
        fill_ground(canvas, camera, road.quad(near_end, far_end, t0, t1), colour)

    paint = light.shade(bgr(215, 218, 220) * rng.uniform(0.75, 1.0), up, 8.0)
    t = road.right - road.lane
    while t > road.left + 1.0:
        solid = rng.random() < 0.2
        start = rng.uniform(0, 6)
        s = near_end if solid else near_end + start
        while s < 90:
            stop = far_end if solid else s + 3.0
            fill_ground(canvas, camera, road.quad(s, stop, t - 0.07, t + 0.07), paint)
            s = stop + 5.0
        t -= road.lane
    if rng.random() < 0.25:  # a zebra crossing
        s = rng.uniform(8, 35)
        for stripe in np.arange(road.left + 0.3, road.right - 0.5, 1.0).tolist():
            fill_ground(canvas, camera, road.quad(s, s + 3.0, stripe, stripe + 0.5), paint)

    x, z, first = _ground_grid(camera)
    noise = rng.normal(0, 1, (256, 256)).astype(np.float32)
    noise += 1.6 * cv2.resize(rng.normal(0, 1, (32, 32)).astype(np.float32), (256, 256))
    scale = rng.uniform(6, 12)  # texture pixels a metre
    texture = cv2.remap(
        noise, np.mod(x * scale + 128, 256), np.mod(z * scale, 256), cv2.INTER_NEAREST, borderMode=cv2.BORDER_WRAP
    )
    strength = (rng.uniform(3, 7) * np.clip(14.0 / z, 0.15, 1.0)).astype(np.float32)
    canvas[first:] = np.clip(canvas[first:] + (texture * strength)[..., None], 0, 255).astype(np.uint8)
    return canvas
