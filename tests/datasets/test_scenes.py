import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmitp.datasets.scenes import Camera, SceneLabel, is_validation_frame, render_scene, write_scenes
from mmitp.datasets.scenes.geometry import clip_near
from mmitp.datasets.scenes.mesh import Thing
from mmitp.datasets.scenes.rendering import compose
from mmitp.evaluation.kitti_ap import read_ground_truth, read_split

SMALL = (320, 96)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rendered():
    return [render_scene(5, i, (384, 128)) for i in range(40)]


def _objects(frames):
    return [label for frame in frames for label in frame.labels if label.name != "DontCare"]


def _digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    first = _digest(write_scenes(tmp_path / "a", 3, seed=7, size=SMALL))
    again = _digest(write_scenes(tmp_path / "b", 3, seed=7, size=SMALL))
    other = _digest(write_scenes(tmp_path / "c", 3, seed=8, size=SMALL))
    assert first == again
    images = [name for name in first if name.endswith(".png")]
    assert len(images) == 3
    assert all(first[name] != other[name] for name in images)


def test_a_frame_does_not_depend_on_the_number_of_frames(tmp_path):
    few = _digest(write_scenes(tmp_path / "few", 2, seed=1, size=SMALL))
    many = _digest(write_scenes(tmp_path / "many", 5, seed=1, size=SMALL))
    frames = [name for name in few if name.startswith("training")]
    assert len(frames) == 4
    assert all(few[name] == many[name] for name in frames)


def test_a_frame_stays_what_it_was_in_earlier_versions():
    """Results measured on generated scenes stay comparable: each random draw keeps its place."""
    frame = render_scene(5, 1, SMALL)
    assert [label.line() for label in frame.labels] == [
        "Car 0.33 0 -1.86 179.30 53.47 280.41 95.00 1.35 1.69 3.85 1.72 1.65 5.78 -1.57",
        "Car 0.09 0 -1.44 81.62 47.32 146.86 95.00 1.53 1.70 3.97 -1.24 1.65 6.92 -1.62",
        "Pedestrian 0.00 0 -1.76 176.30 43.37 185.73 68.17 1.71 0.71 0.95 1.65 1.65 12.83 -1.64",
        "Pedestrian 0.00 0 2.16 48.31 41.73 55.53 59.31 1.93 0.63 1.00 -11.72 1.65 20.74 1.64",
        "Cyclist 0.00 3 -1.36 128.06 42.71 136.13 69.61 1.76 0.54 1.83 -1.73 1.65 12.67 -1.50",
        "DontCare -1 -1 -10 20.64 43.69 83.59 53.74 -1 -1 -1 -1000 -1000 -1000 -10",
        "DontCare -1 -1 -10 130.45 44.17 160.88 57.72 -1 -1 -1 -1000 -1000 -1000 -10",
    ]
    np.testing.assert_allclose(frame.image.mean((0, 1)), [96.108, 100.255, 99.140], atol=0.1)


def test_the_files_are_kittis_layout(tmp_path):
    root = write_scenes(tmp_path / "out", 5, seed=2, size=SMALL, val_fraction=0.4)
    train, val = read_split(root / "ImageSets/train.txt"), read_split(root / "ImageSets/val.txt")
    assert (train, val) == (["000000", "000001", "000003"], ["000002", "000004"])
    assert read_split(root / "ImageSets/trainval.txt") == [f"{i:06d}" for i in range(5)]
    assert json.loads((root / "scenes.json").read_text()) == {
        "frames": 5,
        "seed": 2,
        "size": [320, 96],
        "val_fraction": 0.4,
    }
    for i in range(5):
        image = cv2.imread(str(root / f"training/image_2/{i:06d}.png"))
        assert image.shape == (96, 320, 3)
        truth = read_ground_truth(root / f"training/label_2/{i:06d}.txt")
        expected = render_scene(2, i, SMALL)
        assert list(truth.names) == [label.name for label in expected.labels]
        np.testing.assert_array_equal(image, expected.image)


@pytest.mark.parametrize("there", ["training/image_2/000000.png", "training/label_2/000007.txt", "ImageSets/train.txt"])
def test_somebody_elses_data_set_is_not_overwritten(tmp_path, there):
    own = tmp_path / there
    own.parent.mkdir(parents=True)
    own.write_text("real")
    with pytest.raises(ValueError, match="is no set of generated scenes"):
        write_scenes(tmp_path, 2, size=SMALL)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]
    assert own.read_text() == "real"


def test_own_scenes_are_written_anew_also_where_writing_was_ended(tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path, 2, size=SMALL, progress=stop)
    assert not (tmp_path / "scenes.json").exists()
    write_scenes(tmp_path, 2, size=SMALL)
    write_scenes(tmp_path, 1, seed=1, size=SMALL)
    assert json.loads((tmp_path / "scenes.json").read_text())["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ImageSets", "scenes.json", "training"]


@pytest.mark.parametrize("ended", [False, True])
def test_a_smaller_set_leaves_no_frames_of_a_larger_one_and_what_is_not_ours(tmp_path, ended):
    def stop(done):
        if ended and done == 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_scenes(tmp_path, 3, size=SMALL, progress=stop)
    (tmp_path / "training/image_2/000007.png").write_text("somebody's own")
    with pytest.raises(ValueError, match="at least 160 x 64"):
        write_scenes(tmp_path, 1, size=(16, 16))
    assert (tmp_path / "training/label_2/000001.txt").is_file()
    write_scenes(tmp_path, 1, seed=1, size=SMALL)
    names = [path.name for path in sorted((tmp_path / "training").rglob("0*"))]
    assert names == ["000000.png", "000007.png", "000000.txt"]


def test_another_programs_scenes_json_is_no_mark_of_generated_scenes(tmp_path):
    own = tmp_path / "ImageSets/train.txt"
    own.parent.mkdir(parents=True)
    own.write_text("real")
    (tmp_path / "scenes.json").write_text('[{"token": "1"}]')
    with pytest.raises(ValueError, match=r"no scenes\.json of ours"):
        write_scenes(tmp_path, 2, size=SMALL)
    assert own.read_text() == "real"


def test_every_fourth_frame_is_for_validation():
    assert [i for i in range(8) if is_validation_frame(i, 0.25)] == [3, 7]
    assert not any(is_validation_frame(i, 0.0) for i in range(100))
    assert sum(is_validation_frame(i, 0.1) for i in range(1000)) == 100


def test_the_camera_is_kittis():
    camera = Camera()
    pixel = camera.project(np.array([1.0, 1.65, 10.0]))
    np.testing.assert_allclose(pixel, [609.56 + 72.154, 172.85 + 119.0541], rtol=1e-12)
    half = Camera(621, 375)
    assert half.focal == pytest.approx(721.54 / 2)


def test_label_lines_have_kittis_fields():
    label = SceneLabel("Car", 0.256, 1, -1.5, (1, 2.345, 30, 40), (1.5, 1.6, 4.0), (-2.0, 1.65, 20.0), -1.6)
    assert label.line() == "Car 0.26 1 -1.50 1.00 2.35 30.00 40.00 1.50 1.60 4.00 -2.00 1.65 20.00 -1.60"
    region = SceneLabel("DontCare", -1, -1, -10, (1, 2, 3, 4), (-1,) * 3, (-1000,) * 3, -10)
    assert region.line() == "DontCare -1 -1 -10 1.00 2.00 3.00 4.00 -1 -1 -1 -1000 -1000 -1000 -10"


def test_labels_are_within_their_ranges(rendered):
    labels = [label for frame in rendered for label in frame.labels]
    assert len(labels) > 100
    for label in labels:
        x1, y1, x2, y2 = label.box
        assert 0 <= x1 < x2 <= 383
        assert 0 <= y1 < y2 <= 127
    for label in _objects(rendered):
        assert 0 <= label.truncation <= 1
        assert label.occlusion in (0, 1, 2, 3)
        assert min(label.dimensions) > 0
        assert label.location[1] == 1.65  # on the ground
        assert label.location[2] > 1
        assert -math.pi <= label.alpha <= math.pi
        expected = label.rotation_y - math.atan2(label.location[0], label.location[2])
        assert math.cos(label.alpha - expected) == pytest.approx(1)


def test_every_class_and_difficulty_occurs(rendered):
    objects = _objects(rendered)
    names = {label.name for frame in rendered for label in frame.labels}
    assert names >= {"Car", "Van", "Truck", "Pedestrian", "Cyclist", "DontCare"}
    assert {label.occlusion for label in objects} == {0, 1, 2, 3}
    counts = []
    for height, occlusion, truncation in ((40, 0, 0.15), (25, 1, 0.30), (25, 2, 0.50)):
        counts.append(
            sum(
                label.name == "Car"
                and label.box[3] - label.box[1] > height
                and label.occlusion <= occlusion
                and label.truncation <= truncation
                for label in objects
            )
        )
    easy, moderate, hard = counts
    assert 10 < easy < moderate < hard


def test_a_cars_box_fits_its_projected_3d_box(rendered):
    checked = 0
    for frame in rendered:
        for label in frame.labels:
            if label.name != "Car" or label.truncation > 0:
                continue
            h, w, length = label.dimensions
            corners = [(dx * length / 2, -up * h, dz * w / 2) for dx in (-1, 1) for up in (0, 1) for dz in (-1, 1)]
            c, s = math.cos(label.rotation_y), math.sin(label.rotation_y)
            points = np.array([(c * x + s * z, y, -s * x + c * z) for x, y, z in corners]) + label.location
            pixels = frame.camera.project(points)
            low, high = pixels.min(axis=0), pixels.max(axis=0)
            box = np.array(label.box)
            # The body is inside its 3D box, touches the ground with the wheels, and is rounded off at the top.
            assert (box[:2] >= low - 0.5).all()
            assert (box[2:] <= high + 0.5).all()
            assert (box[2] - box[0]) > 0.8 * (high[0] - low[0])
            assert (box[3] - box[1]) > 0.8 * (high[1] - low[1])
            checked += 1
    assert checked > 30


def _square(depth, x1, y1, x2, y2, name="Car"):
    outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], dtype=float)
    return Thing(
        depth, [(outline, (10.0, 20.0, 30.0), True)], name, dimensions=(1.5, 1.6, 4.0), location=(0.0, 1.65, depth)
    )


def _compose(*things):
    canvas = np.zeros((100, 200, 3), np.uint8)
    return compose(canvas, list(things), Camera(200, 100))[1]


@pytest.mark.parametrize(("covered", "level"), [(0, 0), (9, 0), (11, 1), (45, 1), (55, 2), (80, 2), (90, 3), (98, 3)])
def test_occlusion_follows_the_visible_share(covered, level):
    back = _square(20, 50, 20, 149, 79)  # 100 columns of pixels
    front = _square(10, 50 - 30, 10, 49 + covered, 90, name="Van")
    labels = _compose(back, front)
    assert [label.name for label in labels] == ["Car", "Van"]
    assert labels[0].occlusion == level
    assert labels[0].box == (50, 20, 149, 79)  # hidden parts included
    assert labels[1].occlusion == 0


def test_an_invisible_object_has_no_label_and_the_order_of_things_does_not_matter():
    back, front = _square(20, 50, 20, 149, 79), _square(10, 40, 10, 160, 90, name="Van")
    assert [label.name for label in _compose(back, front)] == ["Van"]
    assert [label.name for label in _compose(front, back)] == ["Van"]


def test_truncation_is_the_share_of_the_box_outside_the_image():
    assert _compose(_square(10, -50, 20, 50, 60))[0].truncation == pytest.approx(0.5)
    # 199 and 99 are the last columns and rows: half of the width and of the height remain
    label = _compose(_square(10, 159, 59, 239, 139))[0]
    assert label.truncation == pytest.approx(0.75)
    assert label.box == (159, 59, 199, 99)
    assert _compose(_square(10, 20, 20, 90, 60))[0].truncation == 0


def test_small_vehicles_and_groups_become_dont_care():
    tiny = _square(60, 20, 50, 40, 60)
    group = [_square(80, 100, 50, 110, 57), _square(90, 112, 50, 121, 56)]
    for thing in group:
        thing.group = 0
    labels = _compose(tiny, *group)
    assert [label.name for label in labels] == ["DontCare", "DontCare"]
    assert labels[0].box == (19, 49, 41, 61)
    assert labels[1].box == (99, 49, 122, 58)


def test_polygons_are_cut_at_the_near_plane():
    square = np.array([[0.0, 1.65, -1.0], [1.0, 1.65, -1.0], [1.0, 1.65, 1.8], [0.0, 1.65, 1.8]])
    cut = clip_near(square)
    assert cut[:, 2].min() == pytest.approx(0.4)
    assert cut[:, 2].max() == 1.8
    assert len(cut) == 4
    assert clip_near(square - [0, 0, 5]).shape == (0, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frames": 0}, "frames"),
        ({"frames": 1, "val_fraction": 1.0}, "val_fraction"),
        ({"frames": 1, "size": (100, 50)}, "160 x 64"),
        ({"frames": 1, "seed": -1}, "seed"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / "x", **kwargs)


def test_the_command_writes_the_same_scenes_and_reports_mistakes(tmp_path):
    command = [sys.executable, str(ROOT / "tools/make_scenes.py")]
    args = [str(tmp_path / "cli"), "--frames", "2", "--seed", "4", "--size", "320", "96", "--val", "0.5"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command + args, capture_output=True, text=True, env=env, check=True)
    assert "2 frames of 320 x 96" in done.stdout
    assert _digest(tmp_path / "cli") == _digest(write_scenes(tmp_path / "api", 2, 4, SMALL, 0.5))
    wrong = subprocess.run([*command, "x", "--frames", "0"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "frames must be in" in wrong.stderr
