"""What KITTI's label files say of a frame."""

from __future__ import annotations

from dataclasses import dataclass


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
