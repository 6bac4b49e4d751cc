"""Classes of the data and of the network: too few outputs end in an index error, missing names lose boxes silently.

Labels that mean one class in training and another in the validation give wrong figures. The same for the annotation
file that a metric judges by.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import load
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmitp.engine.attack import unwrap
from mmitp.engine.results import check_writable

#: mmpretrain's head, mmdet's of one stage and of two
HEAD = re.compile(r"head|(.*\.)?bbox_head(\.\d+)?")


class ClassCheck(Hook):
    """Compares the training data's classes with the network's before the first step."""

    priority = "HIGHEST"

    def before_run(self, runner: Runner) -> None:
        """Refuses a metric in COCO's format that would fail on the tested data, or judge it by other images, and one
        whose results cannot be written at the end.

        Raises:
            ValueError: names the annotation file, or the file to write.
        """
        for loop in (runner._val_loop, runner._test_loop):
            dataset = getattr(getattr(loop, "dataloader", None), "dataset", None)
            for metric in getattr(getattr(loop, "evaluator", None), "metrics", ()):
                if isinstance(prefix := getattr(metric, "outfile_prefix", None), str) and is_main_process():
                    check_writable(f"{prefix}.json")
                if problem := unfit_metric(dataset, metric):
                    raise ValueError(problem)

    def before_train(self, runner: Runner) -> None:
        """Refuses fewer outputs than classes, names that no annotation has, and labels that mean other classes in
        the validation; tells of more outputs.

        Raises:
            ValueError: names the key and what it should be, or the annotation files.
        """
        dataset = getattr(getattr(runner.train_loop, "dataloader", None), "dataset", None)
        classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
        if not isinstance(classes, (list, tuple)) or not classes:
            return
        if problems := fewer_outputs(unwrap(runner.model), classes):
            raise ValueError(problems[0])
        for told in [*more_outputs(unwrap(runner.model), classes), *missing_names(dataset)]:
            runner.logger.warning(told)
        if problem := shifted(label_names(dataset), tested_names(runner._val_loop)):
            raise ValueError(problem)

    def before_test(self, runner: Runner) -> None:
        """Tells of labels that mean other classes than metainfo says; the training's files may not be there."""
        for file, names in tested_names(runner.test_loop).items():
            classes = [str(name) for name in runner.test_loop.dataloader.dataset.metainfo.get("classes") or names]
            if names != classes:
                runner.logger.warning(
                    f"{file} has the classes in the order {', '.join(names)}, metainfo.classes is "
                    f"{', '.join(classes)}: labels are numbered in the file's order, so the figures are right only if "
                    "the network was trained with a file of the same order"
                )


def heads(model: nn.Module) -> dict[str, int]:
    """Modules that have one output a class, and how many classes they were made for."""
    if hasattr(model, "language_model"):  # classes are words there
        return {}
    named = ((name, getattr(module, "num_classes", None)) for name, module in model.named_modules())
    return {name: count for name, count in named if HEAD.fullmatch(name) and isinstance(count, int)}


def fewer_outputs(model: nn.Module, classes: Sequence[str]) -> list[str]:
    """What is wrong with heads that have fewer outputs than the data has classes."""
    named = ", ".join(map(str, classes[:5])) + (", ..." if classes[5:] else "")
    return [
        f"the data has {len(classes)} classes ({named}), and model.{name}.num_classes is {count}: they have to be as "
        "many (or name fewer classes in the data's metainfo)"
        for name, count in heads(model).items()
        if count < len(classes)
    ]


def more_outputs(model: nn.Module, classes: Sequence[str]) -> list[str]:
    """What is odd about heads that have more outputs than the data has classes."""
    return [
        f"the data has {len(classes)} classes, and model.{name}.num_classes is {count}: {count - len(classes)} outputs "
        "are trained for nothing"
        for name, count in heads(model).items()
        if count > len(classes)
    ]


def missing_names(dataset: Any) -> list[str]:
    """Which classes of a data set in COCO's format its annotation file does not have, and of which one in Pascal VOC's
    no box is there: mmdet leaves out boxes of other names.

    Raises:
        ValueError: it has none of them.
    """
    found = []
    for part in _parts(dataset):
        if any(kind.__name__ == "XMLDataset" for kind in type(part).__mro__):
            found += _without_boxes(part)
        classes, ids = (getattr(part, "metainfo", None) or {}).get("classes", ()), getattr(part, "cat_ids", None)
        if not isinstance(ids, list) or len(ids) >= len(classes):
            continue
        with open(part.ann_file, encoding="utf-8") as file:
            names = [str(category.get("name")) for category in json.load(file).get("categories", ())]
        lost = [name for name in classes if name not in names]
        if not lost:
            continue
        near = difflib.get_close_matches(lost[0], names, 1)
        text = (
            f"{part.ann_file} has no class {', '.join(map(repr, lost))}, which metainfo.classes names: boxes of it are "
            f"not there. The file's classes are {', '.join(names)}" + (f"; the nearest is {near[0]!r}" if near else "")
        )
        if not ids:
            raise ValueError(text)
        found.append(text)
    return found


def _without_boxes(dataset: Any) -> list[str]:
    """Classes of which a data set has no box; every name may be in its files, or none.

    Raises:
        ValueError: it has no box at all.
    """
    classes = dataset.metainfo["classes"]
    there = {box["bbox_label"] for i in range(len(dataset)) for box in dataset.get_data_info(i)["instances"]}
    lost = [name for label, name in enumerate(classes) if label not in there]
    if not lost:
        return []
    text = (
        f"no box of {dataset.ann_file} is of class {', '.join(map(repr, lost))}, which metainfo.classes names: the "
        "names in the XML files have to be equal, capitals too; boxes of other names are left out"
    )
    if not there:
        raise ValueError(text)
    return [text]


def label_names(dataset: Any) -> dict[str, list[str]]:
    """What the labels 0, 1, ... of data sets in COCO's format are called, by annotation file.

    mmdet numbers the chosen classes in the order of the file's categories, whatever the order of ``metainfo.classes``.
    """
    found = {}
    for part in _parts(dataset):
        if isinstance(ids := getattr(part, "cat_ids", None), list):
            content = load(part.ann_file, file_format="json", backend_args=getattr(part, "backend_args", None))
            names = {category["id"]: str(category["name"]) for category in content["categories"]}
            found[str(part.ann_file)] = [names[i] for i in ids]
    return found


def tested_names(loop: Any) -> dict[str, list[str]]:
    """:func:`label_names` of what a loop tests on, and of what its metrics judge by."""
    dataset = getattr(getattr(loop, "dataloader", None), "dataset", None)
    found = label_names(dataset)
    for metric in getattr(getattr(loop, "evaluator", None), "metrics", ()):
        api, meta = getattr(metric, "_coco_api", None), getattr(dataset, "metainfo", None) or {}
        if api is not None and found and "classes" in meta:
            ids = api.get_cat_ids(cat_names=list(meta["classes"]))
            found[f"the ann_file of {type(metric).__name__}"] = [str(api.cats[i]["name"]) for i in ids]
    return found


def shifted(trained: Mapping[str, list[str]], tested: Mapping[str, list[str]]) -> str:
    """Which label means one class in one annotation file and another in another; an empty text where none does.

    A class that a training file lacks is learnt from the others, if it is the last one; a test needs all.
    """
    if not trained:
        return ""
    longest = max(trained, key=lambda file: len(trained[file]))
    for file, names in {**trained, **tested}.items():
        for label, name in enumerate(trained[longest]):
            here = names[label] if label < len(names) else None
            if here != name and (here is not None or file in tested):
                return (
                    f"label {label} is {name!r} by {longest} and {repr(here) if here else 'no class'} by {file}: mmdet "
                    "numbers the classes in the order of a file's categories. List the same categories in the same "
                    "order in all annotation files, also those without boxes"
                )
    return ""


def unfit_metric(dataset: Any, metric: Any) -> str:
    """What mmdet's CocoMetric would fail on after the first epoch, or be wrong by; an empty text where nothing."""
    api, parts = getattr(metric, "_coco_api", None), _parts(dataset)
    if api is None or len(parts) != 1 or all(kind.__name__ != "CocoMetric" for kind in type(metric).__mro__):
        return ""
    file = getattr(parts[0], "ann_file", "the data set's annotation file")
    for number, box in enumerate(api.dataset.get("annotations") or ()):
        if "iscrowd" not in box:
            return (
                f"{file}: annotations[{number}] has no 'iscrowd', which the evaluation needs: add \"iscrowd\": 0 to "
                "every annotation"
            )
    for index in range(len(parts[0])):
        info = parts[0].get_data_info(index)
        judged, path = api.imgs.get(info.get("img_id")), info.get("img_path", "")
        if judged is None or Path(str(judged.get("file_name", path))).stem != Path(path).stem:
            found = "no such image there" if judged is None else f"{judged['file_name']} there"
            return (
                f"the evaluator's ann_file is not of the images that are tested: image {info.get('img_id')!r} of "
                f"{file} is {path}, and {found}. Set val_evaluator.ann_file (or test_evaluator's) to the data set's"
            )
    return ""


def _parts(dataset: Any) -> list[Any]:
    """The data sets inside wrappers (repeated, concatenated, mixed)."""
    inner = getattr(dataset, "datasets", None) or getattr(dataset, "dataset", None)
    if inner is None:
        return [dataset]
    return [part for each in (inner if isinstance(inner, (list, tuple)) else [inner]) for part in _parts(each)]
