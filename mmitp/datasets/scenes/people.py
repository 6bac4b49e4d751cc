"""Pedestrians, cyclists and sitting persons; dimensions are (height, width, length) in metres."""

from __future__ import annotations

import numpy as np

from mmitp.datasets.scenes.mesh import Colour, Mesh, bgr, pick
from mmitp.datasets.scenes.vehicles import CAR_PAINTS, TYRE

_CLOTHES = [
    bgr(40, 38, 36),
    bgr(70, 55, 45),
    bgr(110, 60, 40),
    bgr(60, 50, 140),
    bgr(190, 190, 185),
    bgr(150, 150, 120),
    bgr(60, 110, 70),
    bgr(90, 140, 190),
    bgr(50, 150, 200),
    bgr(130, 100, 150),
]
_SKINS = [bgr(150, 175, 215), bgr(120, 150, 195), bgr(70, 95, 140), bgr(50, 65, 95)]
Limb = tuple[tuple[float, float, float], tuple[float, float, float], float, float, Colour]


def _limbs(mesh: Mesh, limbs: list[Limb]) -> None:
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
    shirt, trousers, skin = pick(rng, _CLOTHES), pick(rng, _CLOTHES[:4]), pick(rng, _SKINS)
    hair = pick(rng, [bgr(30, 35, 45), bgr(50, 80, 110), bgr(120, 170, 200), bgr(150, 150, 150)])
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
            limbs.append((foot, (foot[0] + 0.16, 0.04, foot[2]), 0.05, 0.04, TYRE))
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


def draw_pedestrian(mesh: Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, _ = dims
    _limbs(mesh, _person_limbs(rng, height, width, (0.0, 0.5 * height), "walk", 0.04))


def draw_sitting(mesh: Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, _ = dims
    seat = pick(rng, [bgr(60, 90, 120), bgr(90, 90, 90)])
    bench = np.array([[-0.38, 0.0], [-0.38, 0.42], [0.05, 0.42], [0.05, 0.0]])
    mesh.prism(bench, [width * 0.45] * 4, seat)
    _limbs(mesh, _person_limbs(rng, height, width, (-0.15, 0.5), "sit", 0.0))


def draw_cyclist(mesh: Mesh, dims: tuple[float, float, float], rng: np.random.Generator) -> None:
    height, width, length = dims
    frame = pick(rng, CAR_PAINTS[3:])
    radius, base = 0.34, length / 2 - 0.34
    for x in (-base, base):
        mesh.ring((x, radius, 0.0), radius, 0.055, TYRE * 1.3)
    tubes: list[Limb] = [
        ((-base, radius, 0.0), (-0.05, 0.32, 0.0), 0.025, 0.025, frame),
        ((-0.05, 0.32, 0.0), (-0.2, 0.88, 0.0), 0.028, 0.028, frame),
        ((-base, radius, 0.0), (-0.18, 0.78, 0.0), 0.022, 0.022, frame),
        ((-0.05, 0.32, 0.0), (base - 0.16, 0.8, 0.0), 0.028, 0.028, frame),
        ((-0.18, 0.8, 0.0), (base - 0.16, 0.85, 0.0), 0.028, 0.028, frame),
        ((base, radius, 0.0), (base - 0.2, 0.98, 0.0), 0.026, 0.026, frame),
        ((base - 0.2, 1.0, -width * 0.4), (base - 0.2, 1.0, width * 0.4), 0.024, 0.024, TYRE),
    ]
    _limbs(mesh, tubes + _person_limbs(rng, height, width, (-0.2, 0.95), "ride", 0.45))
