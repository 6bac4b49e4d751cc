"""Buildings, trees, bushes, poles and fences: drawn, never labelled."""

from __future__ import annotations

import math

import numpy as np

from mmitp.datasets.scenes.geometry import CAMERA_HEIGHT, CIRCLE, NEAR, Camera, Pose, rectangle
from mmitp.datasets.scenes.mesh import Colour, Light, Mesh, Polygon, Thing, bgr, cast_shadow, pick
from mmitp.datasets.scenes.road import Road


def _building(camera: Camera, light: Light, rng: np.random.Generator, pose: Pose, length: float) -> Thing:
    mesh = Mesh(camera, light, pose)
    height, depth = rng.uniform(5, 14), rng.uniform(6, 12)
    wall = pick(
        rng,
        [bgr(*c) for c in ((170, 185, 195), (120, 150, 175), (90, 105, 150), (150, 150, 150), (190, 205, 215))],
    )
    profile = np.array([[-length / 2, 0], [-length / 2, height], [length / 2, height], [length / 2, 0]])
    seen = mesh.prism(profile, [depth / 2] * 4, wall)
    pane = bgr(75, 65, 55) * rng.uniform(0.7, 1.6)
    for name, along in (("left", length), ("right", length), ("0", depth), ("2", depth)):
        if name not in seen or pose.z > 60:
            continue
        wall_face = seen[name].order(0, 3, 2, 1)
        columns, rows = max(1, int(along / 3.2)), max(1, int(height / 3.2))
        for i in range(columns):
            for j in range(rows):
                u, v = (i + 0.28) / columns, (j + 0.3) / rows
                tone = 0.85 + 0.1 * ((i * 7 + j * 3) % 4)
                mesh.patch(wall_face, u, v, u + 0.44 / columns, v + 0.45 / rows, pane * tone)
    return Thing(pose.z, mesh.polygons(), shadow=cast_shadow(rectangle(pose, length, depth), height, light))


def _blobs(
    camera: Camera,
    light: Light,
    rng: np.random.Generator,
    centre: np.ndarray,
    radii: np.ndarray,
    colour: Colour,
    number: int,
) -> list[Polygon]:
    """Leaves: jittered discs inside an ellipsoid around ``centre`` (camera coordinates), lit from above."""
    offsets = rng.normal(0, 0.42, (number, 3)).clip(-0.9, 0.9)
    offsets = offsets[np.argsort(-offsets[:, 2] + offsets[:, 1] * -0.3)]
    sizes = rng.uniform(0.25, 0.5, number)
    jitter = rng.uniform(0.75, 1.2, (number, len(CIRCLE), 1))
    tones = rng.uniform(0.8, 1.2, number) * (0.62 - 0.45 * offsets[:, 1])
    points = centre + offsets * radii
    keep = points[:, 2] >= NEAR
    points, sizes, jitter, tones = points[keep], sizes[keep], jitter[keep], tones[keep]
    scale = camera.focal * sizes * float(radii[:2].mean()) / points[:, 2]
    outlines = camera.project(points)[:, None] + CIRCLE[:, :2] * jitter * scale[:, None, None]
    strength = light.strength((0.0, -1.0, 0.0))
    distance = float(centre[2])
    return [
        (outline, light.lit(colour, strength * float(tone), distance), True)
        for outline, tone in zip(outlines, tones, strict=True)
    ]


def _tree(camera: Camera, light: Light, rng: np.random.Generator, x: float, z: float) -> Thing:
    pose = Pose(x, z, 0.0)
    mesh = Mesh(camera, light, pose)
    height, spread = rng.uniform(5, 11), rng.uniform(1.6, 3.4)
    trunk = height * rng.uniform(0.25, 0.42)
    mesh.limb((0, 0, 0), (rng.uniform(-0.2, 0.2), trunk + 0.8, 0), rng.uniform(0.13, 0.28), 0.12, bgr(45, 60, 75))
    green = pick(rng, [bgr(45, 95, 60), bgr(35, 75, 45), bgr(50, 115, 95), bgr(40, 110, 130)])
    centre = np.array([x, CAMERA_HEIGHT - (trunk + height) / 2, z])
    radii = np.array([spread, (height - trunk) / 2, spread])
    polygons = mesh.polygons() + _blobs(camera, light, rng, centre, radii, green, 40 if z < 30 else 18)
    shadow = cast_shadow(rectangle(pose, spread, spread), height * 0.8, light)
    return Thing(z, polygons, shadow=shadow)


def _bush(camera: Camera, light: Light, rng: np.random.Generator, x: float, z: float) -> Thing:
    green = pick(rng, [bgr(40, 85, 55), bgr(30, 65, 40), bgr(45, 100, 85)])
    height = rng.uniform(0.6, 1.5)
    radii = np.array([rng.uniform(0.7, 1.6), height / 2, 0.7])
    polygons = _blobs(camera, light, rng, np.array([x, CAMERA_HEIGHT - height / 2, z]), radii, green, 16)
    return Thing(z, polygons)


def _pole(camera: Camera, light: Light, rng: np.random.Generator, x: float, z: float) -> Thing:
    mesh = Mesh(camera, light, Pose(x, z, 0.0))
    height, grey = rng.uniform(2.2, 6.5), bgr(110, 112, 115) * rng.uniform(0.5, 1.3)
    radius = rng.uniform(0.04, 0.1)
    mesh.limb((0, 0, 0), (0, height, 0), radius, radius * 0.8, grey)
    kind = rng.integers(3)
    if kind == 0:  # a traffic sign
        fill = pick(rng, [bgr(40, 40, 200), bgr(190, 90, 30), bgr(230, 230, 230), bgr(60, 200, 230)])
        mesh.disc((0, height - 0.1, -0.05), 0.33, fill)
        mesh.disc((0, height - 0.1, -0.06), 0.22, bgr(225, 225, 225))
    elif kind == 1:  # a traffic light
        mesh.prism(np.array([[-0.15, height - 0.9], [-0.15, height], [0.15, height], [0.15, height - 0.9]]), [0.15] * 4,
                   bgr(30, 30, 30))  # fmt: skip
        mesh.disc((0, height - 0.2, -0.17), 0.09, bgr(40, 40, 240))
    return Thing(z, mesh.polygons())


def _fence(camera: Camera, light: Light, rng: np.random.Generator, pose: Pose, length: float) -> Thing:
    mesh = Mesh(camera, light, pose)
    height = rng.uniform(0.7, 2.0)
    colour = pick(rng, [bgr(130, 135, 140), bgr(60, 85, 110), bgr(170, 175, 180)])
    profile = np.array([[-length / 2, 0], [-length / 2, height], [length / 2, height], [length / 2, 0]])
    seen = mesh.prism(profile, [0.06] * 4, colour)
    for name in ("left", "right"):
        if name in seen:
            panel = seen[name].order(0, 3, 2, 1)
            for i in range(int(length / 1.5)):
                u = i * 1.5 / length
                mesh.patch(panel, u, 0.0, u + 0.1 / length * 1.5, 1.0, colour * 0.7)
    return Thing(pose.z, mesh.polygons())


def clutter(camera: Camera, light: Light, road: Road, rng: np.random.Generator) -> list[Thing]:
    things: list[Thing] = []
    for sign, edge in ((-1.0, road.left), (1.0, road.right)):
        style = rng.random()
        if style < 0.6:  # a row of buildings
            along, setback = rng.uniform(4, 25), rng.uniform(5, 12)
            while along < 110:
                length = rng.uniform(8, 22)
                x, z = road.to_camera(along + length / 2, edge + sign * (setback + 5))
                if rng.random() < 0.8:
                    things.append(_building(camera, light, rng, Pose(x, z, road.heading - math.pi / 2), length))
                along += length + rng.uniform(0, 8)
        if style > 0.3:
            along = rng.uniform(5, 14)
            gap = rng.uniform(5, 14)
            while along < 90:
                x, z = road.to_camera(along, edge + sign * rng.uniform(2.2, 9))
                things.append(_tree(camera, light, rng, x, z))
                along += gap * rng.uniform(0.6, 1.6)
        for _ in range(int(rng.integers(0, 5))):
            x, z = road.to_camera(rng.uniform(6, 40), edge + sign * rng.uniform(2.0, 7))
            things.append(_bush(camera, light, rng, x, z))
        for _ in range(int(rng.integers(0, 4))):
            x, z = road.to_camera(rng.uniform(6, 45), edge + sign * rng.uniform(0.4, 1.5))
            things.append(_pole(camera, light, rng, x, z))
        if rng.random() < 0.25:
            length = rng.uniform(8, 25)
            x, z = road.to_camera(rng.uniform(10, 35) + length / 2, edge + sign * rng.uniform(3.5, 5))
            things.append(_fence(camera, light, rng, Pose(x, z, road.heading - math.pi / 2), length))
    return [t for t in things if t.polygons]
