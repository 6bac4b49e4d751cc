"""Which labelled objects a frame holds, how large they are and where they stand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mmitp.datasets.scenes.geometry import CAMERA_HEIGHT, Camera, Pose, overlap, rectangle, wrap_angle
from mmitp.datasets.scenes.mesh import Light, Mesh, Thing, cast_shadow
from mmitp.datasets.scenes.people import draw_cyclist, draw_pedestrian, draw_sitting
from mmitp.datasets.scenes.road import Road
from mmitp.datasets.scenes.vehicles import draw_car, draw_truck, draw_van

MIN_LABEL_HEIGHT = 16.0  # pixels; smaller vehicles are DontCare
_MODELS: dict[str, Callable[[Mesh, tuple[float, float, float], np.random.Generator], None]] = {
    "Car": draw_car,
    "Van": draw_van,
    "Truck": draw_truck,
    "Pedestrian": draw_pedestrian,
    "Cyclist": draw_cyclist,
    "Person_sitting": draw_sitting,
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


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(max(low * 1.01, high)))))


def _build(
    name: str,
    dims: tuple[float, float, float],
    pose: Pose,
    camera: Camera,
    light: Light,
    rng: np.random.Generator,
) -> Thing | None:
    """The object at a pose, or None where it would stand at or behind the camera."""
    mesh = Mesh(camera, light, pose)
    _MODELS[name](mesh, dims, rng)
    polygons = mesh.polygons()
    if mesh.too_near or not polygons:
        return None
    outline = rectangle(pose, dims[2], dims[1])
    return Thing(
        pose.z,
        polygons,
        name,
        dimensions=dims,
        location=(pose.x, CAMERA_HEIGHT, pose.z),
        rotation_y=wrap_angle(pose.rotation_y),
        shadow=cast_shadow(outline, dims[0] * 0.8, light),
    )


def _size_of(name: str, rng: np.random.Generator) -> tuple[float, float, float]:
    h, w, length = (mean + spread * min(2.0, max(-2.0, float(rng.normal()))) for mean, spread in _DIMENSIONS[name])
    if name == "Pedestrian" and rng.random() < 0.1:
        h *= 0.72  # a child
    return h, w, length


def _place(name: str, dims: tuple[float, float, float], camera: Camera, road: Road, rng: np.random.Generator) -> Pose:
    """Draws a distance such that the heights in pixels are spread log-uniformly, and a fitting lateral place."""
    largest = camera.focal * dims[0] / (0.92 * camera.nearest_ground())
    z = camera.focal * dims[0] / _log_uniform(rng, MIN_LABEL_HEIGHT + 1, largest)
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
    return Pose(float(x), float(z), float(heading))


def actors(camera: Camera, light: Light, road: Road, rng: np.random.Generator) -> list[Thing]:
    names: list[str] = []
    for _ in range(int(rng.integers(2, 9))):
        names.append(str(rng.choice(["Car", "Van", "Truck"], p=[0.86, 0.09, 0.05])))
    names += ["Pedestrian"] * int(rng.choice([0, 1, 2, 3, 5], p=[0.35, 0.25, 0.2, 0.1, 0.1]))
    names += ["Cyclist"] * int(rng.choice([0, 1, 2], p=[0.55, 0.3, 0.15]))
    names += ["Person_sitting"] * int(rng.random() < 0.08)
    things: list[Thing] = []
    footprints: list[np.ndarray] = []
    for name in names:
        for _attempt in range(6):
            dims = _size_of(name, rng)
            pose = _place(name, dims, camera, road, rng)
            footprint = rectangle(pose, dims[2] + 0.3, dims[1] + 0.3)
            if footprint[:, 2].min() < 1.5 or any(overlap(footprint, other) for other in footprints):
                continue
            thing = _build(name, dims, pose, camera, light, rng)
            if thing is not None:
                things.append(thing)
                footprints.append(footprint)
                break
    for group in range(int(rng.choice([0, 1, 2], p=[0.4, 0.4, 0.2]))):
        things += _far_group(group, camera, light, rng)
    return things


def _far_group(group: int, camera: Camera, light: Light, rng: np.random.Generator) -> list[Thing]:
    """Two to four vehicles too small to be labelled one by one."""
    first = camera.focal * 1.53 / _log_uniform(rng, 5.0, 0.7 * MIN_LABEL_HEIGHT)
    x = rng.uniform(-0.8, 0.8) * first * camera.width / (2 * camera.focal)
    things = []
    for i in range(int(rng.integers(2, 5))):
        dims = _size_of("Car", rng)
        pose = Pose(float(x + i * rng.uniform(1.2, 2.4)), float(first * (1 + 0.12 * i)), float(rng.uniform(-3, 3)))
        thing = _build("Car", dims, pose, camera, light, rng)
        if thing is not None:
            thing.group = group
            things.append(thing)
    return things
