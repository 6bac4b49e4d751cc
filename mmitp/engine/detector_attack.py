"""What an evaluation attack on an mmdet detector raises, and ground truth in the coordinates the network sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from mmdet.models.dense_heads import CenterNetHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.structures.bbox import HorizontalBoxes, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmitp.attacks import fabrication, vanishing
from mmitp.engine.attack import training_loss

Objective = Literal["truth", "own", "vanishing", "fabrication"]

_MOVES = ("scale_factor", "homography_matrix", "border", "flip_direction")
"""What transforms that change an image's geometry leave in its record."""


def detector_loss(
    model: nn.Module,
    data: dict[str, Any],
    objective: Objective,
    *,
    original: bool = False,
    score_thr: float = 0.3,
    per_image: bool = False,
) -> Callable[[Tensor], Tensor]:
    """The loss to raise for one preprocessed batch; its data samples stay as they are.

    Args:
        model: unwrapped detector in eval mode.
        data: the preprocessor's output.
        objective: ``"truth"``: the training loss against the ground truth; ``"own"``: the training loss against the
            detector's own detections on the clean image (TOG, Chow et al. 2020), no ground truth needed;
            ``"fabrication"``: the loss against "no object anywhere", of a single-stage detector's score maps (see
            :mod:`mmitp.attacks.objectives`) or, in a two-stage detector, the training loss of empty images;
            ``"vanishing"``: minus that.
        original: whether the samples' boxes are in the original image's coordinates (``"truth"`` only), see
            :func:`boxes_are_original`.
        score_thr: least score of a detection that counts as the detector's own.
        per_image: a loss for each image (as several restarts need to pick each image's worst) in place of the batch's.

    Returns:
        ``loss_fn`` giving ``(N,)``, or a scalar for the training loss without ``per_image``.

    Raises:
        ValueError: for a detector or samples that the objective does not fit (the function returned: for a detector
            without a training loss in eval mode).
    """
    two_stage = hasattr(model, "roi_head")
    if objective in ("vanishing", "fabrication") and not two_stage:
        scores = score_logits(model)
        raised = vanishing if objective == "vanishing" else fabrication
        return lambda x: raised(scores(x))
    if getattr(model, "with_mask", False):
        raise ValueError(f"{type(model).__name__} trains on masks too: its training loss cannot be attacked here")
    if objective == "truth":
        samples = input_samples(data["data_samples"], original)
    elif objective == "own":
        samples = own_detections(model, data, score_thr)
    else:
        samples = empty_samples(data["data_samples"], data["inputs"].device)
    sign = -1 if objective == "vanishing" else 1
    batches = [[sample] for sample in samples] if per_image else [samples]
    losses = [training_loss(model, {**data, "data_samples": batch}) for batch in batches]

    def loss_fn(x: Tensor) -> Tensor:
        try:
            values = [loss(x[i : i + 1] if per_image else x) for i, loss in enumerate(losses)]
        except (AttributeError, KeyError, NotImplementedError, TypeError) as error:
            raise ValueError(
                f"{type(model).__name__} does not give its training loss in eval mode on boxes alone "
                f"({type(error).__name__}: {error}), so objective {objective!r} cannot attack it"
            ) from error
        return sign * (torch.stack(values) if per_image else values[0])

    return loss_fn


def score_logits(model: nn.Module) -> Callable[[Tensor], Sequence[Tensor]]:
    """The score maps of a dense detector before the sigmoid, a tensor ``(N, ...)`` a level.

    Raises:
        ValueError: for anything but a single-stage detector whose head scores classes by sigmoids.
    """
    head = getattr(model, "bbox_head", None)
    after_sigmoid = isinstance(head, CenterNetHead)
    if not (after_sigmoid or (isinstance(head, BaseDenseHead) and getattr(head, "use_sigmoid_cls", False))):
        raise ValueError(
            "vanishing and fabrication need a single-stage detector with sigmoid class scores (CenterNet, RetinaNet, "
            f"FCOS, ...) or a two-stage one, not {type(model).__name__} with {type(head).__name__}: attack with "
            "objective 'truth' or 'own'"
        )

    def scores(x: Tensor) -> Sequence[Tensor]:
        maps = model(x, mode="tensor")[0]
        return [torch.logit(level.float(), eps=1e-6) for level in maps] if after_sigmoid else maps

    return scores


def own_detections(model: Any, data: dict[str, Any], score_thr: float) -> list[Any]:
    """Copies of the data samples whose ground truth is what the detector finds in the clean images."""
    copies = copy.deepcopy(data["data_samples"])
    with torch.no_grad():
        found = model.predict(data["inputs"], copies, rescale=False)
    for sample in found:
        kept = sample.pred_instances[sample.pred_instances.scores > score_thr]
        found_boxes, labels = HorizontalBoxes(get_box_tensor(kept.bboxes).float()), kept.labels.clone()
        # CenterNet's head takes the border off whether it rescales or not.
        found_boxes.translate_(_offset(sample.metainfo))
        boxes = found_boxes.tensor
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
        del sample.pred_instances
    return found


def empty_samples(samples: Sequence[Any], device: torch.device) -> list[Any]:
    """Copies of the data samples without any object."""
    copies = copy.deepcopy(list(samples))
    boxes, labels = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.long, device=device)
    for sample in copies:
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        sample.ignored_instances = InstanceData(bboxes=boxes, labels=labels)
    return copies


def input_samples(samples: Sequence[Any], original: bool) -> list[Any]:
    """Copies of the data samples with their boxes in the coordinates of the network's input.

    Boxes are clipped to the image; those outside it are dropped.

    Args:
        samples: a batch's, with ``gt_instances.bboxes`` and as a rule ``ignored_instances``.
        original: whether their boxes are in the original image's coordinates; else they are only copied.

    Raises:
        ValueError: samples without boxes, or without the meta data to map them by.
    """
    if any("bboxes" not in sample.gt_instances for sample in samples):
        raise ValueError(
            "the test pipeline loads no boxes: add LoadAnnotations(with_bbox=True) to it, or attack with objective "
            "'own', which needs no ground truth"
        )
    copies = copy.deepcopy(list(samples))
    if original:
        for sample in copies:
            for name in ("gt_instances", "ignored_instances"):
                if name in sample and "bboxes" in sample.get(name):
                    setattr(sample, name, _mapped(sample.get(name), sample.metainfo))
    return copies


def _mapped(instances: InstanceData, meta: dict[str, Any]) -> InstanceData:
    boxes = HorizontalBoxes(get_box_tensor(instances.bboxes).float())
    if "homography_matrix" in meta:
        boxes.project_(boxes.tensor.new_tensor(meta["homography_matrix"]))
    elif meta.get("flip"):
        raise ValueError("a flipped test image needs 'homography_matrix' in PackDetInputs' meta_keys to map its boxes")
    elif "scale_factor" in meta:
        boxes.rescale_(meta["scale_factor"])
    elif "border" not in meta and tuple(meta["ori_shape"][:2]) != tuple(meta["img_shape"][:2]):
        raise ValueError("boxes cannot be mapped to the input: add 'scale_factor' to PackDetInputs' meta_keys")
    boxes.translate_(_offset(meta))
    boxes.clip_(meta["img_shape"][:2])
    visible = (boxes.widths > 0) & (boxes.heights > 0)
    kept = instances[visible]
    kept.bboxes = boxes.tensor[visible]
    return kept


def _offset(meta: dict[str, Any]) -> tuple[float, float]:
    """Left and top of the image in a canvas that RandomCenterCropPad put it on."""
    border = meta.get("border")
    return (0.0, 0.0) if border is None else (float(border[2]), float(border[0]))


def boxes_are_original(dataset: Any) -> bool:
    """Whether a data set's samples carry boxes in the original image's coordinates.

    mmdet's test pipelines load annotations after the image was resized, and so leave them; a pipeline that loads them
    first moves them along. The pipeline itself is asked: it is run on the first image, one transform at a time.

    Raises:
        ValueError: no pipeline to ask, or one that moves the image both before and after loading the boxes.
    """
    if hasattr(dataset, "datasets"):
        answers = {boxes_are_original(part) for part in dataset.datasets}
        if len(answers) > 1:
            raise ValueError("the parts of the test set differ in where their pipelines load annotations")
        return answers.pop()
    if hasattr(dataset, "dataset"):
        return boxes_are_original(dataset.dataset)
    transforms = getattr(getattr(dataset, "pipeline", None), "transforms", None)
    if not transforms:
        raise ValueError(
            f"{type(dataset).__name__} has no transform pipeline, so the coordinates of its boxes are unknown: attack "
            "with objective 'own', which needs no ground truth"
        )
    record = dataset.get_data_info(0)
    loaded, original = False, False
    before: dict[str, Any] = {}
    for transform in transforms:
        record = transform(record)
        if record is None or "data_samples" in record:
            break
        moves = {key: copy.deepcopy(record[key]) for key in _MOVES if record.get(key) is not None}
        if not loaded and "gt_bboxes" in record:
            loaded, original = True, bool(moves)
        elif loaded and original and str(moves) != str(before):
            raise ValueError("the test pipeline moves the image before and after LoadAnnotations: load them last")
        before = moves
    return original
