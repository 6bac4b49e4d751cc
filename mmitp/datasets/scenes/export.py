"""Scenes as files in KITTI's layout."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2

from mmitp.datasets.scenes.geometry import KITTI_SIZE
from mmitp.datasets.scenes.rendering import render_scene
from mmitp.files import write_whole
from mmitp.values import is_count


def is_validation_frame(index: int, fraction: float) -> bool:
    """Whether frame ``index`` belongs to the validation split: evenly spread, whatever the number of frames."""
    return math.floor((index + 1) * fraction + 1e-9) > math.floor(index * fraction + 1e-9)


def _frames_of(stamp: Path) -> int | None:
    """How many frames a ``scenes.json`` speaks of; ``None`` where it is missing or no file of ours."""
    try:
        arguments = json.loads(stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return arguments["frames"] if isinstance(arguments, dict) and is_count(arguments.get("frames")) else None


def _frames_begun(unfinished: Path) -> int | None:
    """How many frames lie beside the mark of a set that is not whole; ``None`` without it."""
    return max((int(path.name) for path in unfinished.glob("*") if path.name.isdecimal()), default=None)


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
        out: folder, made when missing. Scenes that this function wrote there before are replaced: the frames that a
            larger set had beyond these are removed.
        frames: number of frames, 1 to 1,000,000.
        seed, size: see :func:`render_scene`.
        val_fraction: share of the frames that goes to the validation split, in [0, 1).
        progress: called with the number of frames written so far.

    Returns:
        ``out`` as a path.

    Raises:
        ValueError: for a number of frames or a fraction out of range; ``out`` holds a data set that was not generated.
    """
    if not 1 <= frames <= 1_000_000:
        raise ValueError(f"frames must be in 1..1000000 (file names have six digits), got {frames}")
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
    root = Path(out)
    images, labels, splits = root / "training" / "image_2", root / "training" / "label_2", root / "ImageSets"
    # The one says of whole sets how they were made; the other, folders alone, is there while they are not whole.
    stamp, unfinished = root / "scenes.json", root / "scenes.unfinished"
    there = [folder for folder in (images, labels, splits) if folder.is_dir() and any(folder.iterdir())]
    former = _frames_of(stamp) or _frames_begun(unfinished)
    if there and not (former or unfinished.is_dir()):
        raise ValueError(
            f"{there[0]} holds files, and {root} has no {stamp.name} of ours: it is no set of generated scenes, and "
            "writing one would overwrite it. Take another folder"
        )
    render_scene(seed, 0, size)  # a size or seed that it refuses ends this before anything is removed
    former = max(frames, former or 0)
    (unfinished / str(former)).mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    for folder in (images, labels, splits):
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("[0-9]" * 6 + ".png"), *folder.glob("[0-9]" * 6 + ".txt")]:
            if frames <= int(path.stem) < former:
                path.unlink()
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
    shutil.rmtree(unfinished)
    return root
