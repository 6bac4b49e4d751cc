"""Generated road scenes in the format of the KITTI object benchmark.

A pinhole camera with KITTI's field of view and mounting height looks along a road. Cars, vans, trucks, pedestrians,
cyclists and sitting persons are small shaded 3D models, standing on the ground plane among buildings, trees, poles and
bushes; everything is drawn back to front, so perspective, occlusion and truncation come out of the geometry and the
labels are exact:

* the 2D box is the box of the whole object (hidden parts included), clipped to the image;
* truncation is the share of the unclipped box's area that lies outside the image;
* occlusion follows the visible share v of the object's pixels inside the image: 0 for v >= 0.9, 1 for v >= 0.5,
  2 for v >= 0.15, 3 below (objects without any visible pixel get no label);
* groups of far vehicles are drawn but labelled as one ``DontCare`` region.

Frame ``i`` of seed ``s`` depends on ``(s, i, size)`` alone. Needs numpy and OpenCV.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import cv2
import numpy as np

from mmitp.files import write_whole

KITTI_SIZE = (1242, 375)
"""Width and height of a KITTI image, in pixels."""

_KITTI_FOCAL = 721.54 / 1242  # focal length and principal point as shares of the image's width and height
_KITTI_CX, _KITTI_CY = 609.56 / 1242, 172.85 / 375
_CAMERA_HEIGHT = 1.65  # metres above the ground
_NEAR = 0.4  # metres; polygons are cut at this plane
_MIN_LABEL_HEIGHT = 16.0  # pixels; smaller vehicles are DontCare
_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates

Colour = np.ndarray  # (3,) float, BGR, 0..255
Fill = tuple[float, float, float]
Polygon = tuple[
    np.ndarray, Fill, bool
]  # (n, 2) image coordinates, unclipped; fill; whether it can widen the silhouette


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
        return self.focal * _CAMERA_HEIGHT / (self.height - 1 - self.cy)


@dataclass(frozen=True)
class SceneLabel:
    """One line of a KITTI label file; ``box`` is (x1, y1, x2, y2) in pixels, the rest in metres and radians."""

    name: str
    truncation: float
    occlusion: int
    alpha: float
    box: tuple[float, float, float, float]
    dimensions: tuple[float, float, float]
    """Height, width, length."""
    location: tuple[float, float, float]
    """Centre of the bottom face."""
    rotation_y: float

    def line(self) -> str:
        """The 15 fields as KITTI writes them; a DontCare region carries KITTI's -1, -10 and -1000."""
        box = " ".join(f"{v:.2f}" for v in self.box)
        if self.name == "DontCare":
            return f"DontCare -1 -1 -10 {box} -1 -1 -1 -1000 -1000 -1000 -10"
        rest = " ".join(f"{v:.2f}" for v in (*self.dimensions, *self.location, self.rotation_y))
        return f"{self.name} {self.truncation:.2f} {self.occlusion} {self.alpha:.2f} {box} {rest}"


@dataclass(frozen=True)
class Scene:
    """A rendered frame: ``image`` (H, W, 3) uint8 in BGR order, its labels, and the camera."""

    image: np.ndarray
    labels: list[SceneLabel]
    camera: Camera


@dataclass
class _Thing:
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
class _Light:
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


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


def _clip_near(points: np.ndarray) -> np.ndarray:
    """The part of a 3D polygon with z >= _NEAR."""
    inside = points[:, 2] >= _NEAR
    if inside.all():
        return points
    out = []
    for i, current in enumerate(points):
        previous = points[i - 1]
        if inside[i] != inside[i - 1]:
            t = (_NEAR - previous[2]) / (current[2] - previous[2])
            out.append(previous + t * (current - previous))
        if inside[i]:
            out.append(current)
    return np.array(out).reshape(-1, 3)


_ANGLES = np.arange(12) * (2 * math.pi / 12)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES), np.zeros(12)], axis=1)


def _colour(*bgr: float) -> Colour:
    return np.array(bgr, dtype=np.float64)


@dataclass
class _Pose:
    """Places a model (x forward, y up from the ground, z to its right) into the camera's coordinates."""

    x: float
    z: float
    rotation_y: float

    def __post_init__(self) -> None:
        c, s = math.cos(self.rotation_y), math.sin(self.rotation_y)
        self._matrix = np.array([[c, 0.0, -s], [0.0, -1.0, 0.0], [s, 0.0, c]])
        self._origin = np.array([self.x, _CAMERA_HEIGHT, self.z])
        self.viewer = self._matrix @ -self._origin
        """The camera's place in model coordinates."""

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return points @ self._matrix + self._origin


@dataclass
class _Face:
    """A visible planar face: its corners in camera coordinates, how strongly it is lit, and its distance."""

    world: np.ndarray
    strength: float
    distance: float

    def order(self, *corners: int) -> _Face:
        """The same face, its corners listed in another order."""
        return _Face(self.world[list(corners)], self.strength, self.distance)


@dataclass
class _Mesh:
    """Collects the polygons of one object, already projected and shaded, in drawing order."""

    camera: Camera
    light: _Light
    pose: _Pose
    too_near: bool = False
    _parts: list[tuple[np.ndarray, Fill, bool]] = field(default_factory=list)

    def polygons(self) -> list[Polygon]:
        """What was added so far, in the image; all points are projected in one go."""
        if not self._parts:
            return []
        placed = [points for points, _, _ in self._parts]
        spatial = [i for i, points in enumerate(placed) if points.shape[1] == 3]
        if spatial:
            if min(float(placed[i][:, 2].min()) for i in spatial) < _NEAR:
                self.too_near = True
                for i in spatial:
                    placed[i] = _clip_near(placed[i])
            ends = np.cumsum([len(placed[i]) for i in spatial])[:-1]
            flat = np.split(self.camera.project(np.concatenate([placed[i] for i in spatial])), ends)
            for i, points in zip(spatial, flat, strict=True):
                placed[i] = points
        return [
            (points, fill, solid)
            for points, (_, fill, solid) in zip(placed, self._parts, strict=True)
            if len(points) >= 3
        ]

    def face(self, points: np.ndarray, colour: Colour, inside: np.ndarray | None = None) -> _Face | None:
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
        face = _Face(world, self.light.strength((nx * sign, ny * sign, nz * sign)), distance)
        self._add(world, face, colour, inside is not None)
        return face

    def _add(self, world: np.ndarray, face: _Face, colour: Colour, solid: bool) -> None:
        self._parts.append((world, self.light.lit(colour, face.strength, face.distance), solid))

    def prism(self, profile: np.ndarray, half_widths: Sequence[float], colour: Colour) -> dict[str, _Face]:
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

    def patch(self, face: _Face, u0: float, v0: float, u1: float, v1: float, colour: Colour) -> None:
        """A rectangle in the bilinear coordinates of a quadrilateral (a, b, c, d; u from a to b, v from a to d)."""
        corners = ((u0, v0), (u1, v0), (u1, v1), (u0, v1))
        weights = np.array([[(1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v] for u, v in corners])
        self._add(weights @ face.world, face, colour, False)

    def disc(self, centre: Sequence[float] | np.ndarray, radius: float, colour: Colour, solid: bool = False) -> None:
        """An upright disc in the model's x-y plane."""
        world = self.pose(_CIRCLE * radius + np.asarray(centre))
        c, s = math.cos(self.pose.rotation_y), math.sin(self.pose.rotation_y)
        distance = float(world[:, 2].mean())
        away = s * float(world[0, 0]) + c * float(world[0, 2]) > 0
        normal = (-s, 0.0, -c) if away else (s, 0.0, c)
        self._add(world, _Face(world, self.light.strength(normal), distance), colour, solid)

    def ring(self, centre: Sequence[float], radius: float, thickness: float, colour: Colour) -> None:
        """A thin upright wheel: its tyre only."""
        loop = np.concatenate([_CIRCLE, _CIRCLE[:1]])
        world = self.pose(np.concatenate([loop * radius, loop * (radius - thickness)]) + np.asarray(centre))
        if world[:, 2].min() < _NEAR:
            self.too_near = True
            return
        pixels = self.camera.project(world)
        fill = self.light.shade(colour, (0.0, -1.0, 0.0), float(world[:, 2].mean()))
        outer, inner = pixels[: len(loop)], pixels[len(loop) :]
        for i in range(len(_CIRCLE)):
            self._parts.append((np.array([outer[i], outer[i + 1], inner[i + 1], inner[i]]), fill, True))

    def limb(self, start: Sequence[float], end: Sequence[float], r0: float, r1: float, colour: Colour) -> None:
        """A tapered capsule between two model points, with a lit side."""
        ends = self.pose(np.array([start, end]))
        if ends[:, 2].min() < _NEAR + max(r0, r1):
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
    points = (centres[:, None] + radii[:, None, None] * _CIRCLE[:, :2]).reshape(-1, 2)
    return cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)


def _rectangle(pose: _Pose, length: float, width: float) -> np.ndarray:
    half_l, half_w = length / 2, width / 2
    return pose(np.array([[half_l, 0, half_w], [half_l, 0, -half_w], [-half_l, 0, -half_w], [-half_l, 0, half_w]]))


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
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


def _cast_shadow(outline: np.ndarray, height: float, light: _Light) -> np.ndarray:
    """Hull (n, 3) on the ground of an outline and of its top's shadow."""
    offset = -np.array(light.sun) * (height / max(0.25, -light.sun[1]))
    top = outline + np.array([offset[0], 0.0, offset[2]])
    points = np.concatenate([outline, top])
    hull = cv2.convexHull(points[:, [0, 2]].astype(np.float32))[:, 0]
    return np.stack([hull[:, 0], np.full(len(hull), _CAMERA_HEIGHT), hull[:, 1]], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Models. Each draws into a mesh; dimensions are (height, width, length) in metres.
# ---------------------------------------------------------------------------------------------------------------------

_GLASS = _colour(70, 60, 50)
_TYRE = _colour(28, 28, 30)
_CAR_PAINTS = [
    _colour(205, 205, 205),
    _colour(165, 165, 165),
    _colour(120, 118, 115),
    _colour(45, 42, 40),
    _colour(30, 28, 28),
    _colour(115, 60, 35),
    _colour(150, 95, 50),
    _colour(40, 35, 150),
    _colour(35, 30, 105),
    _colour(60, 95, 55),
    _colour(150, 190, 205),
    _colour(50, 170, 210),
]
_CLOTHES = [
    _colour(40, 38, 36),
    _colour(70, 55, 45),
    _colour(110, 60, 40),
    _colour(60, 50, 140),
    _colour(190, 190, 185),
    _colour(150, 150, 120),
    _colour(60, 110, 70),
    _colour(90, 140, 190),
    _colour(50, 150, 200),
    _colour(130, 100, 150),
]
_SKINS = [_colour(150, 175, 215), _colour(120, 150, 195), _colour(70, 95, 140), _colour(50, 65, 95)]


def _pick(rng: np.random.Generator, items: Sequence[Colour]) -> Colour:
    return np.clip(items[int(rng.integers(len(items)))] * rng.uniform(0.85, 1.15), 5, 245)


def _wheels(mesh: _Mesh, dims: tuple[float, float, float], axles: Sequence[float], radius: float) -> None:
    """Four or more wheels; those of the far side first, hidden later by the body."""
    width = dims[1]
    near = math.copysign(1.0, float(mesh.pose.viewer[2]))
    for side in (-near, near):
        for x in axles:
            mesh.disc((x, radius, side * (width / 2 - 0.02)), radius, _TYRE, True)
            if side == near:
                mesh.disc((x, radius, side * (width / 2 - 0.01)), radius * 0.58, _colour(150, 150, 150))
                mesh.disc((x, radius, side * (width / 2)), radius * 0.2, _colour(60, 60, 60))
        if side != near:
            length = dims[2]
            box = np.array([[-0.47, 0.10], [-0.47, 0.3], [0.47, 0.3], [0.47, 0.10]]) * [length, dims[0]]
            mesh.prism(box, [width * 0.46] * 4, _colour(25, 25, 25))


def _lamps(mesh: _Mesh, rear: _Face | None, front: _Face | None, braking: bool) -> None:
    """Lamps and plates on the rear and front faces (quads whose u runs upwards and v across)."""
    red = _colour(40, 40, 250) if braking else _colour(30, 30, 150)
    if rear is not None:
        for v0, v1 in ((0.03, 0.2), (0.8, 0.97)):
            mesh.patch(rear, 0.55, v0, 0.85, v1, red)
        mesh.patch(rear, 0.3, 0.36, 0.46, 0.64, _colour(215, 220, 220))
    if front is not None:
        for v0, v1 in ((0.04, 0.24), (0.76, 0.96)):
            mesh.patch(front, 0.6, v0, 0.9, v1, _colour(225, 235, 240))
        mesh.patch(front, 0.45, 0.3, 0.75, 0.7, _colour(35, 35, 35))
        mesh.patch(front, 0.18, 0.36, 0.36, 0.64, _colour(215, 220, 220))


def _car(mesh: _Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, length = dims
    paint = _pick(rng, _CAR_PAINTS)
    _wheels(mesh, dims, (-0.31 * length, 0.31 * length), 0.22 * height)
    waist = rng.uniform(0.55, 0.62)
    hood = waist - rng.uniform(0.02, 0.10)
    body = np.array([[-0.5, 0.16], [-0.49, waist], [0.24, waist], [0.46, hood], [0.5, 0.16]]) * [length, height]
    half = width / 2
    seen = mesh.prism(body, [half, half, half, half * 0.94, half * 0.94], paint)
    _lamps(mesh, seen.get("0"), _flip_u(seen.get("3")), bool(rng.random() < 0.3))
    for name in ("left", "right"):
        if name in seen:
            sign = 1.0 if name == "right" else -1.0
            for x in (-0.31, 0.31):
                arch = np.array([x * length, 0.22 * height, sign * (half + 0.002)])
                mesh.disc(arch, 0.255 * height, _colour(20, 20, 20))
                mesh.disc(arch, 0.215 * height, _TYRE)
                mesh.disc(arch, 0.13 * height, _colour(150, 150, 152))
    back = rng.uniform(-0.49, -0.40)  # estates to saloons
    roof = rng.uniform(-0.42, -0.24)
    cabin = np.array([[back, waist], [roof, 1.0], [0.06, 1.0], [0.25, waist]]) * [length, height]
    top, base = half * 0.76, half * 0.94
    seen = mesh.prism(cabin, [base, top, top, base], paint)
    for name in ("left", "right"):
        if name in seen:
            side = seen[name].order(0, 3, 2, 1)  # u along the car, v upwards
            mesh.patch(side, 0.08, 0.12, 0.47, 0.86, _GLASS)
            mesh.patch(side, 0.53, 0.12, 0.92, 0.86, _GLASS)
    if "0" in seen:
        mesh.patch(seen["0"], 0.1, 0.08, 0.9, 0.92, _GLASS * 0.8)
    if "2" in seen:
        mesh.patch(seen["2"], 0.1, 0.06, 0.92, 0.94, _GLASS)


def _flip_u(quad: _Face | None) -> _Face | None:
    """The same quad with u running the other way (front faces are listed from the top down)."""
    return None if quad is None else quad.order(1, 0, 3, 2)


def _van(mesh: _Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, length = dims
    paint = _pick(rng, _CAR_PAINTS[:3] + _CAR_PAINTS[5:7] + _CAR_PAINTS[10:])
    _wheels(mesh, dims, (-0.30 * length, 0.33 * length), 0.16 * height)
    half = width / 2
    body = np.array([[-0.5, 0.13], [-0.49, 1.0], [0.22, 1.0], [0.40, 0.52], [0.5, 0.42], [0.5, 0.13]])
    seen = mesh.prism(body * [length, height], [half, half * 0.9, half * 0.9, half, half, half], paint)
    if "0" in seen:
        rear = seen["0"]
        mesh.patch(rear, 0.55, 0.1, 0.85, 0.47, _GLASS)
        mesh.patch(rear, 0.55, 0.53, 0.85, 0.9, _GLASS)
        for v0, v1 in ((0.02, 0.12), (0.88, 0.98)):
            mesh.patch(rear, 0.25, v0, 0.5, v1, _colour(35, 35, 170))
    if "2" in seen:
        mesh.patch(seen["2"], 0.1, 0.08, 0.9, 0.92, _GLASS)
    _lamps(mesh, None, _flip_u(seen.get("4")), False)
    glazed = rng.random() < 0.5
    for name, sign in (("left", -1.0), ("right", 1.0)):
        if name in seen:
            windows = [(0.12, 0.28)] + ([(-0.16, 0.08), (-0.44, -0.20)] if glazed else [])
            for x0, x1 in windows:
                quad = np.array([[x0, 0.55], [x1, 0.55], [min(x1, 0.21), 0.88], [x0, 0.88]]) * [length, height]
                mesh.face(np.hstack([quad, np.full((4, 1), sign * half * 0.98)]), _GLASS)
            for x in (-0.30, 0.33):
                centre = np.array([x * length, 0.16 * height, sign * (half + 0.002)])
                mesh.disc(centre, 0.16 * height, _TYRE)
                mesh.disc(centre, 0.09 * height, _colour(140, 140, 140))


def _truck(mesh: _Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, length = dims
    paint = _pick(rng, _CAR_PAINTS)
    cargo = _pick(rng, [_colour(215, 215, 215), _colour(150, 110, 60), _colour(60, 60, 160), _colour(170, 190, 200)])
    half = width / 2
    _wheels(mesh, dims, (-0.38 * length, -0.24 * length, 0.36 * length), 0.15 * height)
    parts: list[tuple[np.ndarray, Colour, bool]] = [
        (np.array([[-0.5, 0.25], [-0.5, 1.0], [0.2, 1.0], [0.2, 0.25]]), cargo, False),
        (np.array([[0.23, 0.12], [0.23, 0.80], [0.44, 0.80], [0.5, 0.45], [0.5, 0.12]]), paint, True),
    ]
    if mesh.pose.viewer[0] < 0.2 * length:
        parts.reverse()
    for profile, colour, is_cab in parts:
        seen = mesh.prism(profile * [length, height], [half] * len(profile), colour)
        if is_cab:
            if "2" in seen:
                mesh.patch(seen["2"], 0.1, 0.06, 0.9, 0.94, _GLASS)
            _lamps(mesh, None, _flip_u(seen.get("3")), False)
        elif "0" in seen:
            mesh.patch(seen["0"], 0.04, 0.48, 0.98, 0.52, cargo * 0.7)
            for v0, v1 in ((0.02, 0.14), (0.86, 0.98)):
                mesh.patch(seen["0"], 0.02, v0, 0.08, v1, _colour(35, 35, 180))
        for name, sign in (("left", -1.0), ("right", 1.0)):
            if name in seen:
                if is_cab:
                    quad = np.array([[0.27, 0.48], [0.46, 0.48], [0.43, 0.74], [0.27, 0.74]]) * [length, height]
                    mesh.face(np.hstack([quad, np.full((4, 1), sign * half)]), _GLASS)
                for x in (0.36,) if is_cab else (-0.38, -0.24):
                    centre = np.array([x * length, 0.15 * height, sign * (half + 0.002)])
                    mesh.disc(centre, 0.15 * height, _TYRE)
                    mesh.disc(centre, 0.07 * height, _colour(130, 130, 130))


Limb = tuple[tuple[float, float, float], tuple[float, float, float], float, float, Colour]


def _limbs(mesh: _Mesh, limbs: list[Limb]) -> None:
    """Draws capsules from the farthest to the nearest."""
    depths = [float(mesh.pose(np.array([limb[0], limb[1]]))[:, 2].mean()) for limb in limbs]
    for i in sorted(range(len(limbs)), key=lambda k: -depths[k]):
        mesh.limb(*limbs[i])


def _person_limbs(
    rng: np.random.Generator, height: float, width: float, hips: tuple[float, float], legs: str, lean: float
) -> list[Limb]:
    """Limbs of a person whose hips are at (x, y up); the head's top is at ``height``.

    ``legs``: 'walk', 'sit' or 'ride'.
    """
    hip_x, hip_y = hips
    shirt, trousers, skin = _pick(rng, _CLOTHES), _pick(rng, _CLOTHES[:4]), _pick(rng, _SKINS)
    hair = _pick(rng, [_colour(30, 35, 45), _colour(50, 80, 110), _colour(120, 170, 200), _colour(150, 150, 150)])
    head_r = 0.105 * min(1.0, height / 1.7) + 0.01
    torso = height - 2 * head_r - 0.04 - hip_y
    neck = (hip_x + lean * torso, hip_y + torso, 0.0)
    shoulder = width * 0.36
    phase = rng.uniform(-1, 1)
    limbs: list[Limb] = []
    for side, swing in ((-1.0, phase), (1.0, -phase)):
        hip = (hip_x, hip_y, side * 0.09)
        if legs == "walk":
            knee = (hip_x + 0.22 * swing * hip_y, hip_y * 0.52, side * 0.09)
            foot = (hip_x + 0.38 * swing * hip_y - 0.05, 0.07, side * 0.1)
        elif legs == "sit":
            knee = (hip_x + 0.42, hip_y + 0.03, side * 0.12)
            foot = (hip_x + 0.44, 0.06, side * 0.12)
        else:
            knee = (hip_x + 0.33, hip_y - 0.25 + 0.12 * swing, side * 0.12)
            foot = (hip_x + 0.18 + 0.1 * swing, 0.38 + 0.13 * swing, side * 0.12)
        limbs.append((hip, knee, 0.085, 0.065, trousers))
        limbs.append((knee, foot, 0.062, 0.05, trousers))
        if legs == "walk":
            limbs.append((foot, (foot[0] + 0.16, 0.04, foot[2]), 0.05, 0.04, _TYRE))
        arm = (neck[0] - 0.02, neck[1] - 0.08, side * shoulder)
        if legs == "walk":
            hand = (hip_x - 0.25 * swing, hip_y + 0.02, side * (shoulder + 0.04))
        elif legs == "sit":
            hand = (hip_x + 0.3, hip_y + 0.12, side * shoulder * 0.7)
        else:
            hand = (hip_x + 0.58, hip_y + 0.12, side * shoulder * 0.9)
        elbow = ((arm[0] + hand[0]) / 2 - 0.04, (arm[1] + hand[1]) / 2, side * (shoulder + 0.03))
        limbs.append((arm, elbow, 0.055, 0.05, shirt))
        limbs.append((elbow, hand, 0.048, 0.04, skin if rng.random() < 0.5 else shirt))
    limbs.append(((hip_x, hip_y, 0.0), (neck[0], neck[1] - 0.08, 0.0), 0.16, 0.19 * width / 0.6, shirt))
    head = (neck[0] + 0.03 + lean * 0.1, height - head_r, 0.0)
    limbs.append(((neck[0], neck[1] - 0.02, 0.0), head, 0.055, 0.06, skin))
    limbs.append((head, (head[0], head[1] - 0.04, 0.0), head_r, head_r * 0.85, skin))
    limbs.append(((head[0] - 0.03, head[1], 0.0), (head[0] - 0.04, head[1] - 0.02, 0.0), head_r, head_r * 0.8, hair))
    return limbs


def _pedestrian(mesh: _Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, _ = dims
    _limbs(mesh, _person_limbs(rng, height, width, (0.0, 0.5 * height), "walk", 0.04))


def _sitting(mesh: _Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, _ = dims
    seat = _pick(rng, [_colour(60, 90, 120), _colour(90, 90, 90)])
    bench = np.array([[-0.38, 0.0], [-0.38, 0.42], [0.05, 0.42], [0.05, 0.0]])
    mesh.prism(bench, [width * 0.45] * 4, seat)
    _limbs(mesh, _person_limbs(rng, height, width, (-0.15, 0.5), "sit", 0.0))


def _cyclist(mesh: _Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, length = dims
    frame = _pick(rng, _CAR_PAINTS[3:])
    radius, base = 0.34, length / 2 - 0.34
    for x in (-base, base):
        mesh.ring((x, radius, 0.0), radius, 0.055, _TYRE * 1.3)
    tubes: list[Limb] = [
        ((-base, radius, 0.0), (-0.05, 0.32, 0.0), 0.025, 0.025, frame),
        ((-0.05, 0.32, 0.0), (-0.2, 0.88, 0.0), 0.028, 0.028, frame),
        ((-base, radius, 0.0), (-0.18, 0.78, 0.0), 0.022, 0.022, frame),
        ((-0.05, 0.32, 0.0), (base - 0.16, 0.8, 0.0), 0.028, 0.028, frame),
        ((-0.18, 0.8, 0.0), (base - 0.16, 0.85, 0.0), 0.028, 0.028, frame),
        ((base, radius, 0.0), (base - 0.2, 0.98, 0.0), 0.026, 0.026, frame),
        ((base - 0.2, 1.0, -width * 0.4), (base - 0.2, 1.0, width * 0.4), 0.024, 0.024, _TYRE),
    ]
    _limbs(mesh, tubes + _person_limbs(rng, height, width, (-0.2, 0.95), "ride", 0.45))


_MODELS: dict[str, Callable[[_Mesh, tuple[float, float, float], np.random.Generator], None]] = {
    "Car": _car,
    "Van": _van,
    "Truck": _truck,
    "Pedestrian": _pedestrian,
    "Cyclist": _cyclist,
    "Person_sitting": _sitting,
}
# Mean and standard deviation of height, width and length in metres, near those of KITTI's labels.
_DIMENSIONS = {
    "Car": ((1.53, 0.09), (1.63, 0.08), (3.95, 0.35)),
    "Van": ((2.15, 0.20), (1.90, 0.10), (4.90, 0.40)),
    "Truck": ((3.20, 0.30), (2.50, 0.15), (8.50, 1.20)),
    "Pedestrian": ((1.75, 0.10), (0.64, 0.06), (0.85, 0.12)),
    "Cyclist": ((1.74, 0.07), (0.60, 0.05), (1.76, 0.08)),
    "Person_sitting": ((1.28, 0.05), (0.60, 0.04), (0.85, 0.08)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Clutter and ground
# ---------------------------------------------------------------------------------------------------------------------


def _building(camera: Camera, light: _Light, rng: np.random.Generator, pose: _Pose, length: float) -> _Thing:
    mesh = _Mesh(camera, light, pose)
    height, depth = rng.uniform(5, 14), rng.uniform(6, 12)
    wall = _pick(
        rng,
        [_colour(*bgr) for bgr in ((170, 185, 195), (120, 150, 175), (90, 105, 150), (150, 150, 150), (190, 205, 215))],
    )
    profile = np.array([[-length / 2, 0], [-length / 2, height], [length / 2, height], [length / 2, 0]])
    seen = mesh.prism(profile, [depth / 2] * 4, wall)
    pane = _colour(75, 65, 55) * rng.uniform(0.7, 1.6)
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
    return _Thing(pose.z, mesh.polygons(), shadow=_cast_shadow(_rectangle(pose, length, depth), height, light))


def _blobs(
    camera: Camera,
    light: _Light,
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
    jitter = rng.uniform(0.75, 1.2, (number, len(_CIRCLE), 1))
    tones = rng.uniform(0.8, 1.2, number) * (0.62 - 0.45 * offsets[:, 1])
    points = centre + offsets * radii
    keep = points[:, 2] >= _NEAR
    points, sizes, jitter, tones = points[keep], sizes[keep], jitter[keep], tones[keep]
    scale = camera.focal * sizes * float(radii[:2].mean()) / points[:, 2]
    outlines = camera.project(points)[:, None] + _CIRCLE[:, :2] * jitter * scale[:, None, None]
    strength = light.strength((0.0, -1.0, 0.0))
    distance = float(centre[2])
    return [
        (outline, light.lit(colour, strength * float(tone), distance), True)
        for outline, tone in zip(outlines, tones, strict=True)
    ]


def _tree(camera: Camera, light: _Light, rng: np.random.Generator, x: float, z: float) -> _Thing:
    pose = _Pose(x, z, 0.0)
    mesh = _Mesh(camera, light, pose)
    height, spread = rng.uniform(5, 11), rng.uniform(1.6, 3.4)
    trunk = height * rng.uniform(0.25, 0.42)
    mesh.limb((0, 0, 0), (rng.uniform(-0.2, 0.2), trunk + 0.8, 0), rng.uniform(0.13, 0.28), 0.12, _colour(45, 60, 75))
    green = _pick(rng, [_colour(45, 95, 60), _colour(35, 75, 45), _colour(50, 115, 95), _colour(40, 110, 130)])
    centre = np.array([x, _CAMERA_HEIGHT - (trunk + height) / 2, z])
    radii = np.array([spread, (height - trunk) / 2, spread])
    polygons = mesh.polygons() + _blobs(camera, light, rng, centre, radii, green, 40 if z < 30 else 18)
    shadow = _cast_shadow(_rectangle(pose, spread, spread), height * 0.8, light)
    return _Thing(z, polygons, shadow=shadow)


def _bush(camera: Camera, light: _Light, rng: np.random.Generator, x: float, z: float) -> _Thing:
    green = _pick(rng, [_colour(40, 85, 55), _colour(30, 65, 40), _colour(45, 100, 85)])
    height = rng.uniform(0.6, 1.5)
    radii = np.array([rng.uniform(0.7, 1.6), height / 2, 0.7])
    polygons = _blobs(camera, light, rng, np.array([x, _CAMERA_HEIGHT - height / 2, z]), radii, green, 16)
    return _Thing(z, polygons)


def _pole(camera: Camera, light: _Light, rng: np.random.Generator, x: float, z: float) -> _Thing:
    mesh = _Mesh(camera, light, _Pose(x, z, 0.0))
    height, grey = rng.uniform(2.2, 6.5), _colour(110, 112, 115) * rng.uniform(0.5, 1.3)
    radius = rng.uniform(0.04, 0.1)
    mesh.limb((0, 0, 0), (0, height, 0), radius, radius * 0.8, grey)
    kind = rng.integers(3)
    if kind == 0:  # a traffic sign
        fill = _pick(rng, [_colour(40, 40, 200), _colour(190, 90, 30), _colour(230, 230, 230), _colour(60, 200, 230)])
        mesh.disc((0, height - 0.1, -0.05), 0.33, fill)
        mesh.disc((0, height - 0.1, -0.06), 0.22, _colour(225, 225, 225))
    elif kind == 1:  # a traffic light
        mesh.prism(np.array([[-0.15, height - 0.9], [-0.15, height], [0.15, height], [0.15, height - 0.9]]), [0.15] * 4,
                   _colour(30, 30, 30))  # fmt: skip
        mesh.disc((0, height - 0.2, -0.17), 0.09, _colour(40, 40, 240))
    return _Thing(z, mesh.polygons())


def _fence(camera: Camera, light: _Light, rng: np.random.Generator, pose: _Pose, length: float) -> _Thing:
    mesh = _Mesh(camera, light, pose)
    height = rng.uniform(0.7, 2.0)
    colour = _pick(rng, [_colour(130, 135, 140), _colour(60, 85, 110), _colour(170, 175, 180)])
    profile = np.array([[-length / 2, 0], [-length / 2, height], [length / 2, height], [length / 2, 0]])
    seen = mesh.prism(profile, [0.06] * 4, colour)
    for name in ("left", "right"):
        if name in seen:
            panel = seen[name].order(0, 3, 2, 1)
            for i in range(int(length / 1.5)):
                u = i * 1.5 / length
                mesh.patch(panel, u, 0.0, u + 0.1 / length * 1.5, 1.0, colour * 0.7)
    return _Thing(pose.z, mesh.polygons())


@lru_cache(maxsize=8)
def _ground_grid(camera: Camera) -> tuple[np.ndarray, np.ndarray, int]:
    """Ground coordinates (x, z in metres) of the pixels of the rows below the horizon, and the first such row."""
    first = math.floor(camera.cy) + 1
    rows = np.arange(first, camera.height, dtype=np.float32)[:, None]
    z = camera.focal * _CAMERA_HEIGHT / (rows - camera.cy)
    x = (np.arange(camera.width, dtype=np.float32)[None] - camera.cx) * z / camera.focal
    return x.astype(np.float32), np.broadcast_to(z, x.shape).astype(np.float32), first


def _fixed(points: np.ndarray) -> np.ndarray:
    """Image coordinates in OpenCV's fixed-point format."""
    return np.rint(points.clip(-1e5, 1e5) * (1 << _SHIFT)).astype(np.int32)


def _fill(image: np.ndarray, points: np.ndarray, colour: Sequence[float]) -> None:
    cv2.fillConvexPoly(image, _fixed(points), colour, cv2.LINE_AA, _SHIFT)


def _fill_ground(image: np.ndarray, camera: Camera, points: np.ndarray, colour: Sequence[float]) -> None:
    clipped = _clip_near(points)
    if len(clipped) >= 3:
        _fill(image, camera.project(clipped), colour)


@dataclass
class _Road:
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
        return np.array([[x, _CAMERA_HEIGHT, z] for x, z in corners])


def _background(camera: Camera, light: _Light, road: _Road, rng: np.random.Generator) -> np.ndarray:
    """Sky, far skyline, ground, road and its markings."""
    height, width = camera.height, camera.width
    image = np.empty((height, width, 3), np.float32)
    horizon = camera.cy
    ramp = np.clip(np.arange(height, dtype=np.float32) / horizon, 0, 1)[:, None, None]
    cover = rng.random()
    top = (_colour(235, 160, 95) * (1 - cover) + _colour(215, 210, 205) * cover) * rng.uniform(0.75, 1.1)
    image[:] = top * (1 - ramp) + np.array(light.haze) * ramp
    clouds = cv2.resize(rng.random((6, 14), dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    image += (np.clip(clouds - 0.45, 0, 1) * rng.uniform(0, 120))[..., None]

    ground = _pick(rng, [_colour(60, 100, 85), _colour(55, 85, 75), _colour(105, 115, 120), _colour(80, 110, 125)])
    asphalt = _colour(100, 100, 100) * rng.uniform(0.65, 1.3) + rng.uniform(-5, 5, 3)
    pavement = _colour(135, 140, 145) * rng.uniform(0.8, 1.15)
    up = (0.0, -1.0, 0.0)
    canvas = np.clip(image, 0, 255).astype(np.uint8)
    cv2.rectangle(canvas, (0, int(horizon)), (width, height), light.shade(ground, up, 15.0), -1)

    steps = 48
    line = horizon - camera.focal * np.abs(np.interp(np.linspace(0, 9, steps), np.arange(10), rng.uniform(0, 0.06, 10)))
    line -= rng.uniform(0, 0.006, steps) * camera.focal
    xs = np.linspace(-1, width, steps)
    far = light.shade(_pick(rng, [_colour(50, 80, 60), _colour(120, 120, 115)]), up, 0.6 * light.haze_distance)
    for i in range(steps - 1):
        quad = np.array([[xs[i], line[i]], [xs[i + 1], line[i + 1]], [xs[i + 1], horizon + 1], [xs[i], horizon + 1]])
        tone = rng.uniform(0.9, 1.1)
        _fill(canvas, quad, [channel * tone for channel in far])

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
        _fill_ground(canvas, camera, road.quad(near_end, far_end, t0, t1), colour)

    paint = light.shade(_colour(215, 218, 220) * rng.uniform(0.75, 1.0), up, 8.0)
    t = road.right - road.lane
    while t > road.left + 1.0:
        solid = rng.random() < 0.2
        start = rng.uniform(0, 6)
        s = near_end if solid else near_end + start
        while s < 90:
            stop = far_end if solid else s + 3.0
            _fill_ground(canvas, camera, road.quad(s, stop, t - 0.07, t + 0.07), paint)
            s = stop + 5.0
        t -= road.lane
    if rng.random() < 0.25:  # a zebra crossing
        s = rng.uniform(8, 35)
        for stripe in np.arange(road.left + 0.3, road.right - 0.5, 1.0).tolist():
            _fill_ground(canvas, camera, road.quad(s, s + 3.0, stripe, stripe + 0.5), paint)

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


# ---------------------------------------------------------------------------------------------------------------------
# Composition
# ---------------------------------------------------------------------------------------------------------------------


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(max(low * 1.01, high)))))


def _wrap(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _build(
    name: str,
    dims: tuple[float, float, float],
    pose: _Pose,
    camera: Camera,
    light: _Light,
    rng: np.random.Generator,
) -> _Thing | None:
    """The object at a pose, or None where it would stand at or behind the camera."""
    mesh = _Mesh(camera, light, pose)
    _MODELS[name](mesh, dims, rng)
    polygons = mesh.polygons()
    if mesh.too_near or not polygons:
        return None
    outline = _rectangle(pose, dims[2], dims[1])
    return _Thing(
        pose.z,
        polygons,
        name,
        dimensions=dims,
        location=(pose.x, _CAMERA_HEIGHT, pose.z),
        rotation_y=_wrap(pose.rotation_y),
        shadow=_cast_shadow(outline, dims[0] * 0.8, light),
    )


def _size_of(name: str, rng: np.random.Generator) -> tuple[float, float, float]:
    h, w, length = (mean + spread * min(2.0, max(-2.0, float(rng.normal()))) for mean, spread in _DIMENSIONS[name])
    if name == "Pedestrian" and rng.random() < 0.1:
        h *= 0.72  # a child
    return h, w, length


def _place(name: str, dims: tuple[float, float, float], camera: Camera, road: _Road, rng: np.random.Generator) -> _Pose:
    """Draws a distance such that the heights in pixels are spread log-uniformly, and a fitting lateral place."""
    largest = camera.focal * dims[0] / (0.92 * camera.nearest_ground())
    z = camera.focal * dims[0] / _log_uniform(rng, _MIN_LABEL_HEIGHT + 1, largest)
    half_view = z * camera.width / (2 * camera.focal)
    forward = road.heading - math.pi / 2
    vehicle = name in ("Car", "Van", "Truck")
    across: float | None = None
    heading = forward
    if vehicle:
        slot = rng.random()
        lanes = max(1, int((road.right - road.left) / road.lane))
        if slot < 0.5:  # in traffic; on the left half it comes towards us
            lane = int(rng.integers(lanes))
            across = road.right - road.lane * (lane + 0.5) + rng.normal(0, 0.2)
            heading = forward + (math.pi if lane >= (lanes + 1) // 2 else 0.0) + rng.normal(0, 0.04)
        elif slot < 0.8:  # parked along the kerb or across it
            side = road.right if rng.random() < 0.6 else road.left
            sign = 1.0 if side == road.right else -1.0
            across = side + sign * rng.uniform(-0.6, 1.6)
            heading = forward + (0.0 if rng.random() < 0.7 else math.pi) + rng.normal(0, 0.05)
            if rng.random() < 0.25:
                across, heading = side + sign * dims[2] * 0.55, heading + math.pi / 2
        elif slot < 0.9:  # crossing
            heading = forward + math.pi / 2 * (1 if rng.random() < 0.5 else -1) + rng.normal(0, 0.1)
        else:  # turning
            heading = rng.uniform(-math.pi, math.pi)
    else:
        heading = forward + (math.pi if rng.random() < 0.5 else 0.0) + rng.normal(0, 0.25)
        if name == "Cyclist" and rng.random() < 0.6:
            across = (road.right if rng.random() < 0.6 else road.left) + rng.uniform(-1.2, 1.2)
        elif rng.random() < 0.6:
            sign = 1.0 if rng.random() < 0.5 else -1.0
            across = (road.right if sign > 0 else road.left) + sign * rng.uniform(0.3, 3.5)
        if rng.random() < 0.35:
            heading = rng.uniform(-math.pi, math.pi)
    x = None
    if across is not None:
        x, _ = road.to_camera(z, across)
    if x is None or abs(x) > half_view * 1.08 + dims[1] / 2:
        x = rng.uniform(-1.03, 1.03) * half_view
    return _Pose(float(x), float(z), float(heading))


def _actors(camera: Camera, light: _Light, road: _Road, rng: np.random.Generator) -> list[_Thing]:
    names: list[str] = []
    for _ in range(int(rng.integers(2, 9))):
        names.append(str(rng.choice(["Car", "Van", "Truck"], p=[0.86, 0.09, 0.05])))
    names += ["Pedestrian"] * int(rng.choice([0, 1, 2, 3, 5], p=[0.35, 0.25, 0.2, 0.1, 0.1]))
    names += ["Cyclist"] * int(rng.choice([0, 1, 2], p=[0.55, 0.3, 0.15]))
    names += ["Person_sitting"] * int(rng.random() < 0.08)
    things: list[_Thing] = []
    footprints: list[np.ndarray] = []
    for name in names:
        for _attempt in range(6):
            dims = _size_of(name, rng)
            pose = _place(name, dims, camera, road, rng)
            footprint = _rectangle(pose, dims[2] + 0.3, dims[1] + 0.3)
            if footprint[:, 2].min() < 1.5 or any(_overlap(footprint, other) for other in footprints):
                continue
            thing = _build(name, dims, pose, camera, light, rng)
            if thing is not None:
                things.append(thing)
                footprints.append(footprint)
                break
    for group in range(int(rng.choice([0, 1, 2], p=[0.4, 0.4, 0.2]))):
        things += _far_group(group, camera, light, rng)
    return things


def _far_group(group: int, camera: Camera, light: _Light, rng: np.random.Generator) -> list[_Thing]:
    """Two to four vehicles too small to be labelled one by one."""
    first = camera.focal * 1.53 / _log_uniform(rng, 5.0, 0.7 * _MIN_LABEL_HEIGHT)
    x = rng.uniform(-0.8, 0.8) * first * camera.width / (2 * camera.focal)
    things = []
    for i in range(int(rng.integers(2, 5))):
        dims = _size_of("Car", rng)
        pose = _Pose(float(x + i * rng.uniform(1.2, 2.4)), float(first * (1 + 0.12 * i)), float(rng.uniform(-3, 3)))
        thing = _build("Car", dims, pose, camera, light, rng)
        if thing is not None:
            thing.group = group
            things.append(thing)
    return things


def _clutter(camera: Camera, light: _Light, road: _Road, rng: np.random.Generator) -> list[_Thing]:
    things: list[_Thing] = []
    for sign, edge in ((-1.0, road.left), (1.0, road.right)):
        style = rng.random()
        if style < 0.6:  # a row of buildings
            along, setback = rng.uniform(4, 25), rng.uniform(5, 12)
            while along < 110:
                length = rng.uniform(8, 22)
                x, z = road.to_camera(along + length / 2, edge + sign * (setback + 5))
                if rng.random() < 0.8:
                    things.append(_building(camera, light, rng, _Pose(x, z, road.heading - math.pi / 2), length))
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
            things.append(_fence(camera, light, rng, _Pose(x, z, road.heading - math.pi / 2), length))
    return [t for t in things if t.polygons]


def _occlusion_level(visible: float) -> int:
    """KITTI's level of a visible share in [0, 1]: 0 fully visible, 1 partly, 2 largely hidden, 3 unknown."""
    return 0 if visible >= 0.9 else 1 if visible >= 0.5 else 2 if visible >= 0.15 else 3


def _clip_box(box: np.ndarray, camera: Camera) -> np.ndarray:
    limits = np.array([camera.width - 1, camera.height - 1] * 2, dtype=np.float64)
    return np.clip(box, 0, limits)


def _area(box: np.ndarray) -> float:
    return float(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]))


def _extent(things: Sequence[_Thing]) -> np.ndarray:
    points = np.concatenate([points for thing in things for points, _, solid in thing.polygons if solid])
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _compose(canvas: np.ndarray, things: list[_Thing], camera: Camera) -> tuple[np.ndarray, list[SceneLabel]]:
    """Paints the things onto the background, the farthest first, and measures what remains visible of each."""
    order = sorted(range(len(things)), key=lambda i: -things[i].depth)
    owners = np.full((camera.height, camera.width), -1, np.int16)
    fixed = []
    for thing in things:
        ends = np.cumsum([len(points) for points, _, _ in thing.polygons])[:-1]
        fixed.append(np.split(_fixed(np.concatenate([points for points, _, _ in thing.polygons])), ends))
    for i in order:
        for points, (_, colour, solid) in zip(fixed[i], things[i].polygons, strict=True):
            cv2.fillConvexPoly(canvas, points, colour, cv2.LINE_AA, _SHIFT)
            if solid:
                cv2.fillConvexPoly(owners, points, (i,), cv2.LINE_8, _SHIFT)

    labels: list[SceneLabel] = []
    groups: dict[int, list[_Thing]] = {}
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
        corner = np.array([left << _SHIFT, top << _SHIFT], np.int32)
        for points, (_, _, solid) in zip(fixed[i], thing.polygons, strict=True):
            if solid:
                cv2.fillConvexPoly(alone, points - corner, (1,), cv2.LINE_8, _SHIFT)
        whole = int(alone.sum())
        visible = int((owners[top:bottom, left:right] == i).sum())
        if whole == 0 or visible == 0:
            continue
        if thing.group is not None or full[3] - full[1] < _MIN_LABEL_HEIGHT:
            groups.setdefault(thing.group if thing.group is not None else 1000 + i, []).append(thing)
            continue
        x, _, z = thing.location
        labels.append(
            SceneLabel(
                thing.name,
                min(1.0, max(0.0, 1.0 - _area(box) / _area(full))),
                _occlusion_level(visible / whole),
                _wrap(thing.rotation_y - math.atan2(x, z)),
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
    light = _Light(sun, rng.uniform(0.6, 0.85), diffuse, haze, rng.uniform(110, 400))
    lane = rng.uniform(3.0, 3.7)
    own = lane / 2 + rng.normal(0, 0.25)
    extra = int(rng.choice([0, 0, 1]))
    road = _Road(
        float(rng.normal(0, 0.06)), -lane * (1 + int(rng.integers(0, 3))) - lane + own, own + lane * extra, float(lane)
    )

    canvas = _background(camera, light, road, rng)
    things = _actors(camera, light, road, rng) + _clutter(camera, light, road, rng)
    shadow = np.zeros(canvas.shape[:2], np.uint8)
    for thing in things:
        if thing.shadow is not None:
            outline = _clip_near(thing.shadow)
            if len(outline) >= 3:
                _fill(shadow, camera.project(outline), (255,))
    soft = cv2.GaussianBlur(shadow, (3, 3), 0).astype(np.float32) * (0.9 * diffuse / 255.0)
    canvas = (canvas * (1.0 - soft)[..., None]).astype(np.uint8)
    canvas, labels = _compose(canvas, things, camera)
    return Scene(_expose(canvas, rng), labels, camera)


def is_validation_frame(index: int, fraction: float) -> bool:
    """Whether frame ``index`` belongs to the validation split: evenly spread, whatever the number of frames."""
    return math.floor((index + 1) * fraction + 1e-9) > math.floor(index * fraction + 1e-9)


def write_scenes(
    out: str | Path,
    frames: int,
    seed: int = 0,
    size: tuple[int, int] = KITTI_SIZE,
    val_fraction: float = 0.25,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes a data set that :class:`~mmitp.datasets.KittiDataset` and ``tools/eval_kitti.py`` read.

    ``OUT/training/image_2/000000.png``, ``OUT/training/label_2/000000.txt``, ``OUT/ImageSets/train.txt``, ``val.txt``
    and ``trainval.txt``, and ``OUT/scenes.json`` with the arguments.

    Args:
        out: folder, made when missing. Files of the same names are overwritten.
        frames: number of frames, 1 to 1,000,000.
        seed, size: see :func:`render_scene`.
        val_fraction: share of the frames that goes to the validation split, in [0, 1).
        progress: called with the number of frames written so far.

    Returns:
        ``out`` as a path.

    Raises:
        ValueError: for a number of frames or a fraction out of range.
    """
    if not 1 <= frames <= 1_000_000:
        raise ValueError(f"frames must be in 1..1000000 (file names have six digits), got {frames}")
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
    root = Path(out)
    images, labels, splits = root / "training" / "image_2", root / "training" / "label_2", root / "ImageSets"
    stamp = root / "scenes.json"
    stamp.unlink(missing_ok=True)  # it says of whole sets how they were made
    for folder in (images, labels, splits):
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(frames):
        scene = render_scene(seed, index, size)
        encoded = cv2.imencode(".png", scene.image, [cv2.IMWRITE_PNG_COMPRESSION, 2])[1]
        write_whole(images / f"{index:06d}.png", encoded.tobytes(), durable=False)
        text = "".join(label.line() + "\n" for label in scene.labels)
        write_whole(labels / f"{index:06d}.txt", text, durable=False)
        if progress is not None:
            progress(index + 1)
    held_out = [is_validation_frame(i, val_fraction) for i in range(frames)]
    for name, keep in (
        ("train", [not v for v in held_out]),
        ("val", held_out),
        ("trainval", [True] * frames),
    ):
        ids = "".join(f"{i:06d}\n" for i in range(frames) if keep[i])
        write_whole(splits / f"{name}.txt", ids)
    arguments = {"frames": frames, "seed": seed, "size": list(size), "val_fraction": val_fraction}
    write_whole(stamp, json.dumps(arguments) + "\n")
    return root
