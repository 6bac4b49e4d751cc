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

from mmitp.datasets.scenes.export import is_validation_frame, write_scenes
from mmitp.datasets.scenes.geometry import KITTI_SIZE, Camera
from mmitp.datasets.scenes.labels import SceneLabel
from mmitp.datasets.scenes.rendering import Scene, render_scene

__all__ = ["KITTI_SIZE", "Camera", "Scene", "SceneLabel", "is_validation_frame", "render_scene", "write_scenes"]
