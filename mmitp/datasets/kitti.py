"""KITTI's 2D object benchmark as an OpenMMLab data set."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from PIL import Image

from mmitp.evaluation import kitti_ap
from mmitp.registry import DATASETS
from mmitp.values import is_count

__all__ = ["KittiDataset", "seeded_split"]

_SUFFIXES = (".png", ".jpg")
# In lower case what else is an image; a file with such an ending was hardly meant to be passed over.
_IMAGES = (*_SUFFIXES, ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
_IGNORED_FOR = {"van": "Car", "truck": "Car", "person_sitting": "Pedestrian"}
_SPLITS = {"train75": True, "val25": False}
_ADVICE = (
    "data/README.md says how KITTI is laid out and where it goes; without it, "
    "`mmitp make-scenes --out data/scenes --frames 800` generates scenes in the same format "
    "(link them: `ln -s scenes data/kitti`)"
)


def seeded_split(frames: Sequence[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Splits frames at random into 75 % for training and 25 % for validation, each in sorted order.

    Args:
        frames: frame ids, in any order; the result depends on the set and the seed alone.
        seed: of the shuffle.
    """
    shuffled = sorted(frames)
    random.Random(seed).shuffle(shuffled)
    cut = round(0.75 * len(shuffled))
    return sorted(shuffled[:cut]), sorted(shuffled[cut:])


@DATASETS.register_module()
class KittiDataset(BaseDataset):
    """Images and 2D labels of KITTI's object benchmark, or of scenes generated in its format.

    Objects of the chosen classes are trained on, whatever their size, occlusion or truncation (CenterNet's practice on
    KITTI). Regions in which a detector is neither trained nor punished come as instances with ``ignore_flag`` 1: vans
    and trucks carry the label of Car, sitting persons that of Pedestrian, and DontCare regions the label -1, which
    stands for every class. mmdet packs them as ``ignored_instances``. Anything else is background; class names that
    KITTI does not have at all (``Vehicle``, a misspelt ``Caar``) are counted and warned of.

    A sample's ``img_id`` is the frame's id as KITTI writes it, such as ``'000123'``. Images are read from
    ``training/image_2`` (.png, .jpg) and labels from ``training/label_2`` unless ``data_prefix`` says otherwise;
    without a ``label_path`` in it (the benchmark's ``testing`` folder) frames have no instances.

    Args:
        data_root: folder that holds ``training`` and ``ImageSets``.
        ann_file: split file with one frame id a line, relative to ``data_root``, e.g. ``'ImageSets/train.txt'`` of the
            3DOP split (Chen et al., NIPS 2015).
        split: instead of a split file, ``'train75'`` or ``'val25'``: a seeded random split of all labelled frames, as
            the paper's. With neither, all frames are used.
        split_seed: seed of that split.
        metainfo: ``dict(classes=...)`` chooses a subset of Pedestrian, Car and Cyclist, in label order.
        data_prefix: folders ``img_path`` and ``label_path``, relative to ``data_root``.
        filter_cfg: ``filter_empty_gt=True`` leaves out frames without an object of the classes; by default they are
            kept as examples of background. ``min_size=32`` leaves out images with a side of fewer pixels. Never applied
            in ``test_mode``.
        kwargs: of :class:`mmengine.dataset.BaseDataset` (``pipeline``, ``test_mode``, ``indices``, ...).

    Raises:
        FileNotFoundError: split file, folder, image or label file missing; says which, and where it was looked for.
        ValueError: a malformed label or split file (with line number), an unknown class or split, keys of ``metainfo``,
            ``data_prefix`` or ``filter_cfg`` that would be passed over, a split or filter that leaves no frame.
    """

    METAINFO: dict = {  # noqa: RUF012
        "classes": ("Pedestrian", "Car", "Cyclist"),
        "palette": [(220, 20, 60), (0, 0, 142), (255, 170, 0)],
    }

    def __init__(
        self,
        ann_file: str = "",
        metainfo: dict | None = None,
        data_root: str = "",
        data_prefix: dict | None = None,
        split: str | None = None,
        split_seed: int = 0,
        filter_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if split is not None and split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
        if split is not None and ann_file:
            raise ValueError(
                f"give either a split file (ann_file={ann_file!r}) or a seeded split ({split!r}), not both"
            )
        if not is_count(split_seed, 0):  # None would draw two splits that share frames
            raise ValueError(f"split_seed must be a whole number of at least 0, got {split_seed!r}")
        self.split = split
        self.split_seed = split_seed
        if data_prefix is None:
            data_prefix = {"img_path": "training/image_2", "label_path": "training/label_2"}
        _check_keys("data_prefix", data_prefix, ("img_path", "label_path"))
        if "img_path" not in data_prefix:
            raise ValueError(f"data_prefix has no img_path, the folder of the images: got {dict(data_prefix)}")
        _check_keys("filter_cfg", filter_cfg or {}, ("filter_empty_gt", "min_size"))
        super().__init__(
            ann_file=ann_file,
            metainfo=_with_palette(metainfo),
            data_root=data_root,
            data_prefix=data_prefix,
            filter_cfg=filter_cfg,
            **kwargs,
        )

    def load_data_list(self) -> list[dict]:
        """One dict a frame: ``img_id``, ``img_path``, ``height``, ``width`` and ``instances``."""
        images = Path(self.data_prefix["img_path"])
        labels = Path(self.data_prefix["label_path"]) if "label_path" in self.data_prefix else None
        for folder, what in ((images, "images"), (labels, "labels")):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder.absolute()} with KITTI's {what}: {_ADVICE}")
        classes = [str(name) for name in self.metainfo["classes"]]
        data_list, missing = [], []
        unknown: Counter[str] = Counter()
        for frame in self._frames(images):
            image = next((p for p in (images / (frame + suffix) for suffix in _SUFFIXES) if p.is_file()), None)
            if image is None:
                missing.append(images / (frame + _SUFFIXES[0]))
                continue
            instances = []
            if labels is not None:
                label = labels / f"{frame}.txt"
                if not label.is_file():
                    missing.append(label)
                    continue
                truth = kitti_ap.read_ground_truth(label)
                unknown.update(kitti_ap.unknown_classes([truth]))
                instances = _instances(truth, classes)
            with Image.open(image) as file:
                width, height = file.size
            data_list.append(
                {"img_id": frame, "img_path": str(image), "height": height, "width": width, "instances": instances}
            )
        if missing:
            source = self.ann_file or f"all frames of {images}"
            raise FileNotFoundError(
                f"{len(missing)} of the frames of {source} lack a file, the first: {missing[0].absolute()} "
                f"(images may be {' or '.join(_SUFFIXES)}): {_ADVICE}"
            )
        if unknown:
            print_log(f"{labels}: labels {kitti_ap.describe_unknown(unknown)}", logger="current", level=logging.WARNING)
        return data_list

    def filter_data(self) -> list[dict]:
        """Leaves out small images, and frames without an object, where ``filter_cfg`` asks for it."""
        asked = self.filter_cfg or {}
        if self.test_mode or not asked:
            return self.data_list
        least = asked.get("min_size", 0)
        large = [info for info in self.data_list if min(info["width"], info["height"]) >= least]
        if not large:
            raise ValueError(f"min_size={least} leaves none of {len(self.data_list)} frames: every image is smaller")
        if not asked.get("filter_empty_gt", False):
            return large
        kept = [info for info in large if any(not i["ignore_flag"] for i in info["instances"])]
        if not kept:
            raise ValueError(
                f"filter_empty_gt leaves none of {len(large)} frames: no object of "
                f"{', '.join(self.metainfo['classes'])} is labelled in {self.data_prefix.get('label_path')}"
            )
        return kept

    def get_cat_ids(self, idx: int) -> list[int]:
        """Labels of the objects of sample ``idx``, ignored ones left out."""
        return [i["bbox_label"] for i in self.get_data_info(idx)["instances"] if not i["ignore_flag"]]

    def _frames(self, images: Path) -> list[str]:
        if self.ann_file:
            if not Path(self.ann_file).is_file():
                raise FileNotFoundError(f"no split file {Path(self.ann_file).absolute()}: {_ADVICE}")
            return kitti_ap.read_split(self.ann_file)
        files = sorted(images.iterdir())
        frames = sorted({path.stem for path in files if path.suffix in _SUFFIXES})
        if not frames:
            raise FileNotFoundError(f"no image ({', '.join(_SUFFIXES)}) in {images.absolute()}: {_ADVICE}")
        known = set(frames)
        others = [p.name for p in files if p.suffix.lower() in _IMAGES and p.stem not in known]
        if others:
            print_log(
                f"{images}: {len(others)} images are no frames of the data set, for their names do not end in "
                f"{' or '.join(_SUFFIXES)}, the first: {others[0]}",
                logger="current",
                level=logging.WARNING,
            )
        if self.split is None:
            return frames
        train, val = seeded_split(frames, self.split_seed)
        if not train or not val:
            raise ValueError(
                f"split {self.split!r} needs at least 3 frames to leave some on either side, and {images.absolute()} "
                f"has {len(frames)}: leave split out to use all of them"
            )
        return train if _SPLITS[self.split] else val


def _check_keys(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses keys that nothing would read."""
    strange = [key for key in given if key not in known]
    if strange:
        raise ValueError(
            f"{what} of KittiDataset has no key {', '.join(map(repr, strange))}, it knows {' and '.join(known)} "
            "(_delete_=True drops the keys that a base config gives)"
        )


def _with_palette(metainfo: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Checks the chosen classes and gives them their colours."""
    metainfo = metainfo or {}
    if wrong := [key for key in metainfo if key.lower() == "classes" and key != "classes"]:
        raise ValueError(f"metainfo names the classes under 'classes', not {wrong[0]!r}, which nothing reads")
    if "classes" not in metainfo:
        return metainfo
    known, palette = KittiDataset.METAINFO["classes"], KittiDataset.METAINFO["palette"]
    classes = metainfo["classes"]
    unknown = [name for name in classes if name not in known]
    if isinstance(classes, str) or not classes or unknown or len(set(classes)) != len(classes):
        raise ValueError(f"metainfo classes must be a list of some of {', '.join(known)}, each once, got {classes!r}")
    return {"palette": [palette[known.index(name)] for name in classes], **metainfo}


def _instances(truth: kitti_ap.GroundTruth, classes: Sequence[str]) -> list[dict]:
    labels = {name.lower(): index for index, name in enumerate(classes)}
    instances = []
    for name, box, truncation, occlusion in zip(
        truth.names, truth.boxes, truth.truncation, truth.occlusion, strict=True
    ):
        key = name.lower()
        ignored_for = _IGNORED_FOR.get(key, "").lower()
        if key in labels:
            # A box without area cannot be learned.
            label, ignored = labels[key], bool(np.any(box[2:] <= box[:2]))
        elif key == "dontcare":
            label, ignored = -1, True
        elif ignored_for in labels:
            label, ignored = labels[ignored_for], True
        else:
            continue
        instances.append(
            {
                "bbox": box.tolist(),
                "bbox_label": label,
                "ignore_flag": int(ignored),
                "truncation": float(truncation),
                "occlusion": int(occlusion),
            }
        )
    return instances
