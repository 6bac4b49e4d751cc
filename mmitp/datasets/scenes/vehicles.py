"""Cars, vans and trucks. Each draws into a mesh; dimensions are (height, width, length) in metres."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mmitp.datasets.scenes.mesh import Colour, Face, Mesh, bgr, pick

GLASS = bgr(70, 60, 50)
TYRE = bgr(28, 28, 30)
CAR_PAINTS = [
    bgr(205, 205, 205),
    bgr(165, 165, 165),
    bgr(120, 118, 115),
    bgr(45, 42, 40),
    bgr(30, 28, 28),
    bgr(115, 60, 35),
    bgr(150, 95, 50),
    bgr(40, 35, 150),
    bgr(35, 30, 105),
    bgr(60, 95, 55),
    bgr(150, 190, 205),
    bgr(50, 170, 210),
]


def _wheels(mesh: Mesh, dims: tuple[float, float, float], axles: Sequence[float], radius: float) -> None:
    """Four or more wheels; those of the far side first, hidden later by the body."""
    width = dims[1]
    near = math.copysign(1.0, float(mesh.pose.viewer[2]))
    for side in (-near, near):
        for x in axles:
            mesh.disc((x, radius, side * (width / 2 - 0.02)), radius, TYRE, True)
            if side == near:
                mesh.disc((x, radius, side * (width / 2 - 0.01)), radius * 0.58, bgr(150, 150, 150))
                mesh.disc((x, radius, side * (width / 2)), radius * 0.2, bgr(60, 60, 60))
        if side != near:
            length = dims[2]
            box = np.array([[-0.47, 0.10], [-0.47, 0.3], [0.47, 0.3], [0.47, 0.10]]) * [length, dims[0]]
            mesh.prism(box, [width * 0.46] * 4, bgr(25, 25, 25))


def _lamps(mesh: Mesh, rear: Face | None, front: Face | None, braking: bool) -> None:
    """Lamps and plates on the rear and front faces (quads whose u runs upwards and v across)."""
    red = bgr(40, 40, 250) if braking else bgr(30, 30, 150)
    if rear is not None:
        for v0, v1 in ((0.03, 0.2), (0.8, 0.97)):
            mesh.patch(rear, 0.55, v0, 0.85, v1, red)
        mesh.patch(rear, 0.3, 0.36, 0.46, 0.64, bgr(215, 220, 220))
    if front is not None:
        for v0, v1 in ((0.04, 0.24), (0.76, 0.96)):
            mesh.patch(front, 0.6, v0, 0.9, v1, bgr(225, 235, 240))
        mesh.patch(front, 0.45, 0.3, 0.75, 0.7, bgr(35, 35, 35))
        mesh.patch(front, 0.18, 0.36, 0.36, 0.64, bgr(215, 220, 220))


def draw_car(mesh: Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, length = dims
    paint = pick(rng, CAR_PAINTS)
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
                mesh.disc(arch, 0.255 * height, bgr(20, 20, 20))
                mesh.disc(arch, 0.215 * height, TYRE)
                mesh.disc(arch, 0.13 * height, bgr(150, 150, 152))
    back = rng.uniform(-0.49, -0.40)  # estates to saloons
    roof = rng.uniform(-0.42, -0.24)
    cabin = np.array([[back, waist], [roof, 1.0], [0.06, 1.0], [0.25, waist]]) * [length, height]
    top, base = half * 0.76, half * 0.94
    seen = mesh.prism(cabin, [base, top, top, base], paint)
    for name in ("left", "right"):
        if name in seen:
            side = seen[name].order(0, 3, 2, 1)  # u along the car, v upwards
            mesh.patch(side, 0.08, 0.12, 0.47, 0.86, GLASS)
            mesh.patch(side, 0.53, 0.12, 0.92, 0.86, GLASS)
    if "0" in seen:
        mesh.patch(seen["0"], 0.1, 0.08, 0.9, 0.92, GLASS * 0.8)
    if "2" in seen:
        mesh.patch(seen["2"], 0.1, 0.06, 0.92, 0.94, GLASS)


def _flip_u(quad: Face | None) -> Face | None:
    """The same quad with u running the other way (front faces are listed from the top down)."""
    return None if quad is None else quad.order(1, 0, 3, 2)


def draw_van(mesh: Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, length = dims
    paint = pick(rng, CAR_PAINTS[:3] + CAR_PAINTS[5:7] + CAR_PAINTS[10:])
    _wheels(mesh, dims, (-0.30 * length, 0.33 * length), 0.16 * height)
    half = width / 2
    body = np.array([[-0.5, 0.13], [-0.49, 1.0], [0.22, 1.0], [0.40, 0.52], [0.5, 0.42], [0.5, 0.13]])
    seen = mesh.prism(body * [length, height], [half, half * 0.9, half * 0.9, half, half, half], paint)
    if "0" in seen:
        rear = seen["0"]
        mesh.patch(rear, 0.55, 0.1, 0.85, 0.47, GLASS)
        mesh.patch(rear, 0.55, 0.53, 0.85, 0.9, GLASS)
        for v0, v1 in ((0.02, 0.12), (0.88, 0.98)):
            mesh.patch(rear, 0.25, v0, 0.5, v1, bgr(35, 35, 170))
    if "2" in seen:
        mesh.patch(seen["2"], 0.1, 0.08, 0.9, 0.92, GLASS)
    _lamps(mesh, None, _flip_u(seen.get("4")), False)
    glazed = rng.random() < 0.5
    for name, sign in (("left", -1.0), ("right", 1.0)):
        if name in seen:
            windows = [(0.12, 0.28)] + ([(-0.16, 0.08), (-0.44, -0.20)] if glazed else [])
            for x0, x1 in windows:
                quad = np.array([[x0, 0.55], [x1, 0.55], [min(x1, 0.21), 0.88], [x0, 0.88]]) * [length, height]
                mesh.face(np.hstack([quad, np.full((4, 1), sign * half * 0.98)]), GLASS)
            for x in (-0.30, 0.33):
                centre = np.array([x * length, 0.16 * height, sign * (half + 0.002)])
                mesh.disc(centre, 0.16 * height, TYRE)
                mesh.disc(centre, 0.09 * height, bgr(140, 140, 140))


def draw_truck(mesh: Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, length = dims
    paint = pick(rng, CAR_PAINTS)
    cargo = pick(rng, [bgr(215, 215, 215), bgr(150, 110, 60), bgr(60, 60, 160), bgr(170, 190, 200)])
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
                mesh.patch(seen["2"], 0.1, 0.06, 0.9, 0.94, GLASS)
            _lamps(mesh, None, _flip_u(seen.get("3")), False)
        elif "0" in seen:
            mesh.patch(seen["0"], 0.04, 0.48, 0.98, 0.52, cargo * 0.7)
            for v0, v1 in ((0.02, 0.14), (0.86, 0.98)):
                mesh.patch(seen["0"], 0.02, v0, 0.08, v1, bgr(35, 35, 180))
        for name, sign in (("left", -1.0), ("right", 1.0)):
            if name in seen:
                if is_cab:
                    quad = np.array([[0.27, 0.48], [0.46, 0.48], [0.43, 0.74], [0.27, 0.74]]) * [length, height]
                    mesh.face(np.hstack([quad, np.full((4, 1), sign * half)]), GLASS)
                for x in (0.36,) if is_cab else (-0.38, -0.24):
                    centre = np.array([x * length, 0.15 * height, sign * (half + 0.002)])
                    mesh.disc(centre, 0.15 * height, TYRE)
                    mesh.disc(centre, 0.07 * height, bgr(130, 130, 130))
