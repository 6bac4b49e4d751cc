"""Light, and the shaded polygons of one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from mmitp.datasets.scenes.geometry import CAMERA_HEIGHT, CIRCLE, NEAR, Camera, Pose, clip_near

Colour = np.ndarray  # (3,) float, BGR, 0..255
Fill = tuple[float, float, float]
# outline (n, 2) in image coordinates, unclipped; fill; whether it can widen the silhouette
Polygon = tuple[np.ndarray, Fill, bool]


def bgr(*channels: float) -> Colour:
    return np.array(channels, dtype=np.float64)


def pick(rng: np.random.Generator, items: Sequence[Colour]) -> Colour:
    return np.clip(items[int(rng.integers(len(items)))] * rng.uniform(0.85, 1.15), 5, 245)


@dataclass
class Light:
    """Direction to the sun (camera coordinates), light strengths, and the haze that distance adds."""

    sun: Fill
    ambient: float
    diffuse: float
    haze: Fill
    haze_distance: float

    def shade(self, colour: Colour, normal: Sequence[float], distance: float) -> Fill:
        """The colour as seen on a surface with this unit normal at this distance in metres."""
        return self.lit(colour, self.strength(normal), distance)

    def strength(self, normal: Sequence[float]) -> float:
        nx, ny, nz = normal
        sx, sy, sz = self.sun
        return self.ambient + self.diffuse * max(0.0, nx * sx + ny * sy + nz * sz)

    def lit(self, colour: Colour, strength: float, distance: float) -> Fill:
        mix = 1.0 - math.exp(-max(distance, 0.0) / self.haze_distance)
        b, g, r = colour.tolist()
        haze_b, haze_g, haze_r = self.haze
        keep = 1.0 - mix
        return (
            min(255.0, b * strength) * keep + haze_b * mix,
            min(255.0, g * strength) * keep + haze_g * mix,
            min(255.0, r * strength) * keep + haze_r * mix,
        )


@dataclass
class Thing:
    """Something that stands in the scene: its polygons in drawing order, and what a label needs."""

    depth: float
    polygons: list[Polygon]
    name: str | None = None  # None: clutter
    group: int | None = None  # number of the DontCare group
    dimensions: tuple[float, float, float] = (0.0, 0.0, 0.0)
    location: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation_y: float = 0.0
    shadow: np.ndarray | None = None  # (n, 3) outline on the ground


@dataclass
class Face:
    """A visible planar face: its corners in camera coordinates, how strongly it is lit, and its distance."""

    world: np.ndarray
    strength: float
    distance: float

    def order(self, *corners: int) -> Face:
        """The same face, its corners listed in another order."""
        return Face(self.world[list(corners)], self.strength, self.distance)


@dataclass
class Mesh:
    """Collects the polygons of one object, already projected and shaded, in drawing order."""

    camera: Camera
    light: Light
    pose: Pose
    too_near: bool = False
    _parts: list[tuple[np.ndarray, Fill, bool]] = field(default_factory=list)

    def polygons(self) -> list[Polygon]:
        """What was added so far, in the image; all points are projected in one go."""
        if not self._parts:
            return []
        placed = [points for points, _, _ in self._parts]
        spatial = [i for i, points in enumerate(placed) if points.shape[1] == 3]
        if spatial:
            if min(float(placed[i][:, 2].min()) for i in spatial) < NEAR:
                self.too_near = True
                for i in spatial:
                    placed[i] = clip_near(placed[i])
            ends = np.cumsum([len(placed[i]) for i in spatial])[:-1]
            flat = np.split(self.camera.project(np.concatenate([placed[i] for i in spatial])), ends)
            for i, points in zip(spatial, flat, strict=True):
                placed[i] = points
        return [
            (points, fill, solid)
            for points, (_, fill, solid) in zip(placed, self._parts, strict=True)
            if len(points) >= 3
        ]

    def face(self, points: np.ndarray, colour: Colour, inside: np.ndarray | None = None) -> Face | None:
        """Adds a planar polygon. With ``inside``, a model point behind it, it is left out when seen from behind."""
        world = self.pose(points)
        rows = world.tolist()
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = rows[:3]
        ux, uy, uz, vx, vy, vz = bx - ax, by - ay, bz - az, cx - ax, cy - ay, cz - az
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = math.sqrt(nx * nx + ny * ny + nz * nz)
        if length < 1e-12:
            return None
        away = nx * ax + ny * ay + nz * az > 0  # the normal points away from the camera
        if inside is not None:
            ix, iy, iz = self.pose(inside).tolist()
            outward = nx * (ax - ix) + ny * (ay - iy) + nz * (az - iz) > 0
            if outward == away:
                return None
        sign = (-1.0 if away else 1.0) / length
        distance = sum(row[2] for row in rows) / len(rows)
        face = Face(world, self.light.strength((nx * sign, ny * sign, nz * sign)), distance)
        self._add(world, face, colour, inside is not None)
        return face

    def _add(self, world: np.ndarray, face: Face, colour: Colour, solid: bool) -> None:
        self._parts.append((world, self.light.lit(colour, face.strength, face.distance), solid))

    def prism(self, profile: np.ndarray, half_widths: Sequence[float], colour: Colour) -> dict[str, Face]:
        """Extrudes a convex side profile (n, 2) of (x, y up) to +-half_widths; returns its visible faces by name
        ('left', 'right', and '0', '1', ... for the strip between profile points i and i + 1)."""
        widths = np.asarray(half_widths, dtype=np.float64)[:, None]
        right, left = np.hstack([profile, widths]), np.hstack([profile, -widths])
        middle = np.append(profile.mean(axis=0), 0.0)
        faces = {"left": left, "right": right}
        for i in range(len(profile)):
            j = (i + 1) % len(profile)
            faces[str(i)] = np.array([right[i], right[j], left[j], left[i]])
        visible = {}
        for name, points in faces.items():
            face = self.face(points, colour, middle)
            if face is not None:
                visible[name] = face
        return visible

    def patch(self, face: Face, u0: float, v0: float, u1: float, v1: float, colour: Colour) -> None:
        """A rectangle in the bilinear coordinates of a quadrilateral (a, b, c, d; u from a to b, v from a to d)."""
        corners = ((u0, v0), (u1, v0), (u1, v1), (u0, v1))
        weights = np.array([[(1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v] for u, v in corners])
        self._add(weights @ face.world, face, colour, False)

    def disc(self, centre: Sequence[float] | np.ndarray, radius: float, colour: Colour, solid: bool = False) -> None:
        """An upright disc in the model's x-y plane."""
        world = self.pose(CIRCLE * radius + np.asarray(centre))
        c, s = math.cos(self.pose.rotation_y), math.sin(self.pose.rotation_y)
        distance = float(world[:, 2].mean())
        away = s * float(world[0, 0]) + c * float(world[0, 2]) > 0
        normal = (-s, 0.0, -c) if away else (s, 0.0, c)
        self._add(world, Face(world, self.light.strength(normal), distance), colour, solid)

    def ring(self, centre: Sequence[float], radius: float, thickness: float, colour: Colour) -> None:
        """A thin upright wheel: its tyre only."""
        loop = np.concatenate([CIRCLE, CIRCLE[:1]])
        world = self.pose(np.concatenate([loop * radius, loop * (radius - thickness)]) + np.asarray(centre))
        if world[:, 2].min() < NEAR:
            self.too_near = True
            return
        pixels = self.camera.project(world)
        fill = self.light.shade(colour, (0.0, -1.0, 0.0), float(world[:, 2].mean()))
        outer, inner = pixels[: len(loop)], pixels[len(loop) :]
        for i in range(len(CIRCLE)):
            self._parts.append((np.array([outer[i], outer[i + 1], inner[i + 1], inner[i]]), fill, True))

    def limb(self, start: Sequence[float], end: Sequence[float], r0: float, r1: float, colour: Colour) -> None:
        """A tapered capsule between two model points, with a lit side."""
        ends = self.pose(np.array([start, end]))
        if ends[:, 2].min() < NEAR + max(r0, r1):
            self.too_near = True
            return
        pixels = self.camera.project(ends)
        radii = self.camera.focal * np.array([r0, r1]) / ends[:, 2]
        distance = float(ends[:, 2].mean())
        dark = self.light.shade(colour * 0.72, (0.0, 0.0, -1.0), distance)
        side = np.array(self.light.sun[:2]) / math.hypot(*self.light.sun[:2])
        lit = self.light.shade(colour, (float(side[0]), float(side[1]), 0.0), distance)
        self._parts.append((_capsule(pixels, radii), dark, True))
        self._parts.append((_capsule(pixels + 0.35 * radii[:, None] * side, radii * 0.6), lit, False))


def _capsule(centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Convex outline (n, 2) of two circles in the image."""
    points = (centres[:, None] + radii[:, None, None] * CIRCLE[:, :2]).reshape(-1, 2)
    return cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)


def cast_shadow(outline: np.ndarray, height: float, light: Light) -> np.ndarray:
    """Hull (n, 3) on the ground of an outline and of its top's shadow."""
    offset = -np.array(light.sun) * (height / max(0.25, -light.sun[1]))
    top = outline + np.array([offset[0], 0.0, offset[2]])
    points = np.concatenate([outline, top])
    hull = cv2.convexHull(points[:, [0, 2]].astype(np.float32))[:, 0]
    return np.stack([hull[:, 0], np.full(len(hull), CAMERA_HEIGHT), hull[:, 1]], axis=1)
