"""What is wrong with an annotation file in COCO's format, in words; mmdet's own errors name no cause."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_LISTS = ("images", "categories")
#: What mmdet reads of every entry.
_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}


def fault(path: str, classes: Sequence[str] | None = None) -> str:
    """The first thing that keeps mmdet from training on a file, or an empty text.

    Args:
        path: of the annotation file.
        classes: names that the config chooses, if it does.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError:
        return ""  # the error itself says it
    except (ValueError, RecursionError) as error:
        return f"it is no JSON in UTF-8 (without a byte order mark): {error}"
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__} where a dictionary of images, annotations and categories belongs"
    for key in _LISTS:
        if not isinstance(content.get(key), list):
            return f"it has no list {key!r}"
    entries = {key: content.get(key) or [] for key in _KEYS}
    for key, needed in _KEYS.items():
        for number, entry in enumerate(entries[key]):
            lacking = [name for name in needed if not isinstance(entry, Mapping) or name not in entry]
            if lacking:
                more = ' (as a rule width * height of the box; "iscrowd": 0 belongs there too)'
                return f"{key}[{number}] has no {lacking[0]!r}" + (more if lacking[0] == "area" else "")
    for number, box in enumerate(entry["bbox"] for entry in entries["annotations"]):
        numbers = isinstance(box, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)
        if not numbers or len(box) != 4:
            return f"annotations[{number}].bbox must be four numbers, x, y, width and height, got {box!r}"
    return _nothing_left(entries, classes)


def mixed_up(content: Mapping[str, Any]) -> str:
    """Which two images or categories have one id, or an empty text.

    pycocotools keeps the last of them alone: the first image is not there, and its boxes are the other one's. The same
    entry twice does no harm.

    Args:
        content: of an annotation file.
    """
    for key, name in (("images", "file_name"), ("categories", "name")):
        seen: dict[Any, Any] = {}
        for entry in content.get(key) or ():
            other = seen.setdefault(entry["id"], entry)
            if other.get(name) != entry.get(name):
                what = "images" if key == "images" else "classes"
                return (
                    f"{key} has the id {entry['id']!r} twice, {other.get(name)} and {entry.get(name)}: the {what} and "
                    f"their boxes would be mixed up. Give every one of the {key} an id of its own, and the annotations "
                    "the same ids (files that were joined have to be numbered anew)"
                )
    return ""


def _nothing_left(entries: Mapping[str, list[Any]], classes: Sequence[str] | None) -> str:
    """Why no image would be left to train on."""
    images, boxes, categories = (entries[key] for key in ("images", "annotations", "categories"))
    if not images:
        return "it has no images"
    if not boxes:
        return "it has no annotations, and images without objects are left out (filter_cfg.filter_empty_gt)"
    names = [str(category["name"]) for category in categories]
    if classes and not set(classes) & set(names):
        return (
            f"it has none of the classes {', '.join(map(str, classes))} (metainfo.classes), its own are "
            f"{', '.join(names)}: names have to be equal, capitals too"
        )
    for key, known in (("image_id", images), ("category_id", categories)):
        ids = {repr(entry["id"]) for entry in known}
        if all(repr(box[key]) not in ids for box in boxes):
            of = "image" if key == "image_id" else "category"
            first = known[0]["id"] if known else None
            return (
                f"no annotation belongs to any {of} of it: annotations[0].{key} is {boxes[0][key]!r}, and {of} ids are "
                f"like {first!r} (a number and its text are different)"
            )
    return ""
