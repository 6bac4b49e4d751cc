"""Composition of a frame: painter's order, labels from what remains visible, exposure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mmitp.datasets.scenes.clutter import clutter
from mmitp.datasets.scenes.drawing import SHIFT, fill_polygon, fixed_point
from mmitp.datasets.scenes.geometry import KITTI_SIZE, Camera, clip_near, wrap_angle
from mmitp.datasets.scenes.labels import SceneLabel
from mmitp.datasets.scenes.mesh import Light, Thing
from mmitp.datasets.scenes.road import Road, background
from mmitp.datasets.scenes.traffic import MIN_LABEL_HEIGHT, actors


@dataclass(frozen=True)
class Scene:
    """A rendered frame: ``image`` (H, W, 3) uint8 in BGR order, its labels, and the camera."""

    image: np.ndarray
    labels: list[SceneLabel]
    camera: Camera


def _occlusion_level(visible: float) -> int:
    """KITTI's level of a visible share in [0, 1]: 0 fully visible, 1 partly, 2 largely hidden, 3 unknown."""
    return 0 if visible >= 0.9 else 1 if visible >= 0.5 else 2 if visible >= 0.15 else 3


def _clip_box(box: np.ndarray, camera: Camera) -> np.ndarray:
    limits = np.array([camera.width - 1, camera.height - 1] * 2, dtype=np.float64)
    return np.clip(box, 0, limits)


def _area(box: np.ndarray) -> float:
    return float(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]))


def _extent(things: Sequence[Thing]) -> np.ndarray:
    points = np.concatenate([points for thing in things for points, _, solid in thing.polygons if solid])
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def compose(canvas: np.ndarray, things: list[Thing], camera: Camera) -> tuple[np.ndarray, list[SceneLabel]]:
    """Paints the things onto the background, the farthest first, and measures what remains visible of each."""
    order = sorted(range(len(things)), key=lambda i: -things[i].depth)
    owners = np.full((camera.height, camera.width), -1, np.int16)
    fixed = []
    for thing in things:
        ends = np.cumsum([len(points) for points, _, _ in thing.polygons])[:-1]
        fixed.append(np.split(fixed_point(np.concatenate([points for points, _, _ in thing.polygons])), ends))
    for i in order:
        for points, (_, colour, solid) in zip(fixed[i], things[i].polygons, strict=True):
            cv2.fillConvexPoly(canvas, points, colour, cv2.LINE_AA, SHIFT)
            if solid:
                cv2.fillConvexPoly(owners, points, (i,), cv2.LINE_8, SHIFT)

    labels: list[SceneLabel] = []
    groups: dict[int, list[Thing]] = {}
    for i, thing in enumerate(things):
        if thing.name is None:
            continue
        full = _extent([thing])
        box = _clip_box(full, camera)
        if _area(box) <= 0:
            continue
        left, top = int(box[0]), int(box[1])
        right, bottom = math.ceil(box[2]) + 1, math.ceil(box[3]) + 1
        alone = np.zeros((bottom - top, right - left), np.uint8)
        corner = np.array([left << SHIFT, top << SHIFT], np.int32)
        for points, (_, _, solid) in zip(fixed[i], thing.polygons, strict=True):
            if solid:
                cv2.fillConvexPoly(alone, points - corner, (1,), cv2.LINE_8, SHIFT)
        whole = int(alone.sum())
        visible = int((owners[top:bottom, left:right] == i).sum())
        if whole == 0 or visible == 0:
            continue
        if thing.group is not None or full[3] - full[1] < MIN_LABEL_HEIGHT:
            groups.setdefault(thing.group if thing.group is not None else 1000 + i, []).append(thing)
            continue
        x, _, z = thing.location
        labels.append(
            SceneLabel(
                thing.name,
                min(1.0, max(0.0, 1.0 - _area(box) / _area(full))),
                _occlusion_level(visible / whole),
                wrap_angle(thing.rotation_y - math.atan2(x, z)),
                (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                thing.dimensions,
                thing.location,
                thing.rotation_y,
            )
        )
    for members in groups.values():
        box = _clip_box(_extent(members) + np.array([-1.0, -1.0, 1.0, 1.0]), camera)
        labels.append(SceneLabel("DontCare", -1, -1, -10, tuple(box.tolist()), (-1,) * 3, (-1000,) * 3, -10))
    return canvas, labels


def _expose(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White balance, gamma, a little blur and sensor noise."""
    gain = rng.uniform(0.9, 1.2) * rng.uniform(0.95, 1.05, 3)
    gamma = rng.uniform(0.8, 1.15)
    levels = np.arange(256, dtype=np.float64)[:, None] / 255.0
    table = (np.clip(levels * gain, 0, 1) ** gamma * 255.0).astype(np.uint8)
    out = cv2.LUT(image, table[None])
    if rng.random() < 0.5:
        out = cv2.GaussianBlur(out, (3, 3), rng.uniform(0.3, 0.8))
    noise = rng.standard_normal(out.shape, dtype=np.float32) * np.float32(rng.uniform(1.0, 4.5))
    return np.clip(out + noise, 0, 255).astype(np.uint8)


def render_scene(seed: int, index: int, size: tuple[int, int] = KITTI_SIZE) -> Scene:
    """Renders one frame.

    Args:
        seed: non-negative seed of the whole set.
        index: number of the frame, from 0. The result depends on ``(seed, index, size)`` alone.
        size: width and height in pixels, at least 160 x 64.

    Raises:
        ValueError: for a negative seed or index, or a size too small to show anything.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got {seed} and {index}")
    width, height = size
    if width < 160 or height < 64:
        raise ValueError(f"scenes need a size of at least 160 x 64 pixels (width x height), got {width} x {height}")
    rng = np.random.default_rng([seed, index])
    camera = Camera(width, height)
    azimuth, elevation = rng.uniform(-math.pi, math.pi), rng.uniform(0.35, 1.2)
    level = math.cos(elevation)
    sun = (level * math.sin(azimuth), -math.sin(elevation), level * math.cos(azimuth))
    diffuse = rng.uniform(0.1, 0.6)
    white = rng.uniform(205, 240)
    haze = (white * rng.uniform(1.0, 1.05), white, white * rng.uniform(0.95, 1.0))
    light = Light(sun, rng.uniform(0.6, 0.85), diffuse, haze, rng.uniform(110, 400))
    lane = rng.uniform(3.0, 3.7)
    own = lane / 2 + rng.normal(0, 0.25)
    extra = int(rng.choice([0, 0, 1]))
    road = Road(
        float(rng.normal(0, 0.06)), -lane * (1 + int(rng.integers(0, 3))) - lane + own, own + lane * extra, float(lane)
    )

    canvas = background(camera, light, road, rng)
    things = actors(camera, light, road, rng) + clutter(camera, light, road, rng)
    shadow = np.zeros(canvas.shape[:2], np.uint8)
    for thing in things:
        if thing.shadow is not None:
            outline = clip_near(thing.shadow)
            if len(outline) >= 3:
                fill_polygon(shadow, camera.project(outline), (255,))
    soft = cv2.GaussianBlur(shadow, (3, 3), 0).astype(np.float32) * (0.9 * diffuse / 255.0)
    canvas = (canvas * (1.0 - soft)[..., None]).astype(np.uint8)
    canvas, labels = compose(canvas, things, camera)
    return Scene(_expose(canvas, rng), labels, camera)
