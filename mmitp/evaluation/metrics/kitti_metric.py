"""mmengine metric around :mod:`mmitp.evaluation.kitti_ap`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from mmitp.engine.results import check_writable
from mmitp.evaluation import kitti_ap
from mmitp.registry import METRICS


# Not a tuple: mmengine rebuilds those as plain ones when it gathers results.
@dataclass(frozen=True)
class _Prediction:
    frame: str
    detections: kitti_ap.Detections
    dropped: int  # detections with a box or score that is not finite


@METRICS.register_module()
class KittiMetric(BaseMetric):
    """KITTI 2D AP of a detector's predictions by the official rules.

    Ground truth is read from the label files, not from the data samples: no transform of the pipeline can alter it,
    and classes that the data set does not train on (Van, DontCare) still play their part. Predictions are evaluated
    as they are written to result files: boxes clipped to the image where ``ori_shape`` is known (from 0 to width - 1
    and height - 1, as KITTI's labels are) and rounded to four decimals; so :mod:`mmitp.evaluation.kitti_ap` finds the
    same figures in the files.

    The metrics are percentages: ``kitti/Car_R40_easy``, ``_moderate``, ``_hard``, the same with ``R11``, for each of
    the detector's classes that the benchmark evaluates, and ``kitti/mAP_R40_moderate``, the mean over these classes. A
    class without any detection, which the official program leaves out ("-" in the logged table), counts as 0 here:
    leaving it out would let a model that finds cars only beat one that also finds pedestrians when the best
    checkpoint is chosen.

    Args:
        label_dir: Folder of the label files ``<frame>.txt``, relative to ``data_root``. The frame is the stem of the
            sample's ``img_path``, or its ``img_id``.
        data_root: Prefix of ``label_dir``.
        classes: Names of the detector's labels, in order (a string is one); by default those of the data set's
            ``metainfo``. Those that the benchmark evaluates (Car, Pedestrian, Cyclist, in any case) are.
        outfile_prefix: Folder to write official result files to, one ``<frame>.txt`` a frame; none by default.
        format_only: Only write the files (test images have no labels); no metrics then.
        collect_device: Where results of several processes are gathered, ``'cpu'`` or ``'gpu'``.
        prefix: Replaces ``kitti`` in the metrics' names.

    Raises:
        ValueError: ``format_only`` without ``outfile_prefix``, no class to evaluate, a predicted label that is none of
            ``classes``, a frame without label file or predicted twice, a folder that cannot be written to.
    """

    default_prefix = "kitti"

    def __init__(
        self,
        label_dir: str = "training/label_2",
        data_root: str = "",
        classes: str | Sequence[str] | None = None,
        outfile_prefix: str | None = None,
        format_only: bool = False,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if format_only and outfile_prefix is None:
            raise ValueError("format_only writes result files and nothing else: say where with outfile_prefix")
        self.label_dir = Path(data_root) / label_dir
        self.classes = (classes,) if isinstance(classes, str) else None if classes is None else tuple(classes)
        self.outfile_prefix = None if outfile_prefix is None else Path(outfile_prefix)
        self.format_only = format_only
        self._ground_truth: dict[str, kitti_ap.GroundTruth] = {}
        self._warned: set[str] = set()

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keeps the predictions of a batch.

        Args:
            data_batch: Not used.
            data_samples: Per image a dict with ``pred_instances`` (``bboxes`` (N, 4) x1 y1 x2 y2 in pixels of the
                original image, ``scores`` (N,), ``labels`` (N,)), ``img_path`` or ``img_id``, and ``ori_shape`` (h, w).
        """
        names = self._class_names()
        if self.outfile_prefix is not None and not self.results:  # found out before the work, not after it
            check_writable(self.outfile_prefix / "000000.txt")
        for sample in data_samples:
            pred = sample["pred_instances"]
            boxes, scores = (_float64(pred[key]) for key in ("bboxes", "scores"))
            labels = _float64(pred["labels"]).astype(np.int64)
            boxes = boxes.reshape(-1, 4)
            finite = np.isfinite(boxes).all(1) & np.isfinite(scores)
            boxes, scores, labels = boxes[finite], scores[finite], labels[finite]
            _check_labels(labels, names, sample)
            if sample.get("ori_shape") is not None:
                height, width = sample["ori_shape"][:2]
                boxes = boxes.clip(0, np.array([width - 1, height - 1] * 2, dtype=np.float64))
            detections = kitti_ap.Detections([names[label] for label in labels], boxes.round(4), scores)
            self.results.append(_Prediction(_frame(sample), detections, int((~finite).sum())))

    def compute_metrics(self, results: list[_Prediction]) -> dict[str, float]:
        """The figures of all frames' predictions; logs the table and writes the result files where asked to."""
        frames = [result.frame for result in results]
        if len(set(frames)) != len(frames):
            twice = next(frame for frame in frames if frames.count(frame) > 1)
            raise ValueError(f"frame {twice} was predicted more than once: each frame may count once")
        dropped = sum(result.dropped for result in results)
        if dropped:
            print_log(
                f"{dropped} detections have boxes or scores that are not finite and are left out",
                logger="current",
                level=logging.WARNING,
            )
        if self.outfile_prefix is not None:
            for result in results:
                kitti_ap.write_detections(self.outfile_prefix / f"{result.frame}.txt", result.detections)
            print_log(f"KITTI result files written to {self.outfile_prefix}", logger="current")
        if self.format_only:
            return {}

        known = {name.lower() for name in self._class_names()}
        classes = [name for name in kitti_ap.CLASSES if name.lower() in known]
        if not classes:
            raise ValueError(
                f"none of the classes {sorted(known)} is evaluated by KITTI, which knows {', '.join(kitti_ap.CLASSES)}"
            )
        truth = [self._labels(frame) for frame in frames]
        unknown = kitti_ap.unknown_classes(truth)
        if unknown.keys() - self._warned:  # once, not at every validation
            self._warned |= unknown.keys()
            said = f"{self.label_dir}: labels {kitti_ap.describe_unknown(unknown)}"
            print_log(said, logger="current", level=logging.WARNING)
        ap = kitti_ap.evaluate(truth, [result.detections for result in results], classes)
        print_log(f"KITTI, {len(frames)} frames\n{kitti_ap.format_table(ap)}", logger="current")
        return _metrics(ap)

    def _class_names(self) -> tuple[str, ...]:
        if self.classes is not None:
            return self.classes
        meta = self.dataset_meta or {}
        if "classes" not in meta:
            raise ValueError("the data set's metainfo has no 'classes': give KittiMetric(classes=...)")
        return tuple(meta["classes"])

    def _labels(self, frame: str) -> kitti_ap.GroundTruth:
        if frame not in self._ground_truth:
            path = self.label_dir / f"{frame}.txt"
            if not path.is_file():
                raise ValueError(f"{path} does not exist: KittiMetric reads the ground truth of a frame from there")
            self._ground_truth[frame] = kitti_ap.read_ground_truth(path)
        return self._ground_truth[frame]


def _check_labels(labels: np.ndarray, names: tuple[str, ...], sample: dict) -> None:
    strange = labels[(labels < 0) | (labels >= len(names))]
    if strange.size:
        raise ValueError(
            f"frame {_frame(sample)}: the detector gives label {strange[0]}, and KittiMetric has {len(names)} classes, "
            f"labels 0 to {len(names) - 1} ({', '.join(names)}). Set num_classes of the model's head to {len(names)}, "
            "or name every class of the network, in order, in KittiMetric(classes=...) or the data set's metainfo"
        )


def _float64(values: Any) -> np.ndarray:
    """A float64 array from a tensor of any device and precision, or from anything array-like."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _frame(sample: dict) -> str:
    path = sample.get("img_path")
    if path is not None:
        return Path(path).stem
    frame = sample["img_id"]
    return frame if isinstance(frame, str) else f"{int(frame):06d}"


def _metrics(result: dict[str, kitti_ap.ClassAP | None]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, ap in result.items():
        for rule in ("R11", "R40"):
            values = (0.0, 0.0, 0.0) if ap is None else (ap.r11 if rule == "R11" else ap.r40)
            for difficulty, value in zip(kitti_ap.DIFFICULTIES, values, strict=True):
                metrics[f"{name}_{rule}_{difficulty}"] = value
    moderate = [metrics[f"{name}_R40_moderate"] for name in result]
    metrics["mAP_R40_moderate"] = sum(moderate) / len(moderate)
    return metrics
