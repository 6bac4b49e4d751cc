"""Any OpenMMLab config as a masked model with an example input and random, valid training batches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from mmengine import Config, MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch import nn

from mmitp.engine.cli import UserError
from mmitp.engine.config import enter_scope, require_keys
from mmitp.engine.example import image_channels
from mmitp.engine.input_shape import first_image_shape, input_shape
from mmitp.models.slim_config import FURTHER, drop_pretrained, is_masked, is_type
from mmitp.pruning.rng import kept_rng
from mmitp.pruning.small_steps import SmallSteps


@kept_rng(seed=0)
def build_masked(cfg: Config, linear: bool = False) -> nn.Module:
    """Builds a config's model with masks, as ``mmitp.MaskedModel`` does, without downloading pre-trained weights.

    Args:
        cfg: any config with a model, masked or not.
        linear: mask linear layers too.

    Raises:
        ValueError: the config has no model, or that of a slimmed network, or no layer of it can be masked.
    """
    require_keys(cfg, ["model"], "to report on")
    enter_scope(cfg)
    model = copy.deepcopy(cfg.model)
    if cfg.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", copy.deepcopy(cfg.data_preprocessor))  # as the Runner does
    drop_pretrained(model)
    if is_type(model, "SlimModel"):
        raise UserError(
            "this is a slimmed network's config, and such a network gets no masks: give the config that it was trained "
            f"with (mmitp test, export and report take this one); {FURTHER}"
        )
    if not is_masked(model):
        model = dict(model, type="mmitp.MaskedModel", of=model.type)
    if linear:
        model["prune"] = dict(model.get("prune") or {}, linear=True)
    built = MODELS.build(model)
    if hasattr(built, "init_weights"):
        logging.disable(logging.INFO)  # a line for every parameter
        try:
            built.init_weights()
        finally:
            logging.disable(logging.NOTSET)
    return built


def is_detector(model: nn.Module) -> bool:
    """Whether the model speaks mmdet's interface (boxes), else mmpretrain's (labels)."""
    return hasattr(model, "add_pred_to_datasample")


def stated_shape(cfg: Config, model: nn.Module, asked: Sequence[int] | None = None) -> tuple[tuple[int, int], str]:
    """Height and width that a config's operations are stated for, and how they are known where nobody states them.

    Args:
        cfg: the config.
        model: its model.
        asked: a size to take in any case.

    Returns:
        What is asked for or what the config states (:func:`mmitp.engine.input_shape.input_shape`), with an empty text;
        else the size of the first training image; else 320x320 for detectors and 224x224 for other models.
    """
    if asked is not None:
        return (asked[0], asked[1]), ""
    if stated := input_shape(cfg):
        return stated, ""
    if found := first_image_shape(cfg, model):
        return found, "the size of the first training image, for the config fixes none; --shape H W gives another"
    default = (320, 320) if is_detector(model) else (224, 224)
    return default, "assumed: the config fixes no size, and no training image could be read; --shape H W gives another"


def random_batch(model: nn.Module, shape: tuple[int, int], batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Noise images (uint8, as loaders give them) with valid labels: classes, or boxes with masks and a semantic map."""
    channels = image_channels(model, shape)
    images = [torch.randint(256, (channels, *shape), dtype=torch.uint8, generator=generator) for _ in range(batch)]
    if is_detector(model):
        masks = any("mask_head" in name for name, _ in model.named_modules())
        samples = [_boxes(shape, _classes(model), generator, i, masks) for i in range(batch)]
    else:
        samples = [_label(model, shape, generator) for _ in range(batch)]
    return dict(inputs=images, data_samples=samples)


@kept_rng(seed=0)
def train_on_noise(model: nn.Module, shape: tuple[int, int], iterations: int = 3, batch: int = 2) -> list[float]:
    """A few training steps on random batches; returns the losses.

    They show that the masked network trains, and move what starts at a value that would hide a mistake of slimming
    (biases at 0, norms at 1), by steps of a fixed relative length (:class:`SmallSteps`).

    Raises:
        RuntimeError: a loss is not finite.
    """
    model.train()
    optimizer = OptimWrapper(SmallSteps([p for p in model.parameters() if p.requires_grad]))
    hub = MessageHub.get_current_instance()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(iterations):
        # what some heads and batch augmentations ask the Runner's message hub for
        for key, value in dict(iter=step, epoch=0, max_iters=iterations, max_epochs=1).items():
            hub.update_info(key, value)
        logs = model.train_step(random_batch(model, shape, batch, generator), optimizer)  # type: ignore[operator]
        losses.append(logs["loss"].item())
        if not torch.isfinite(torch.tensor(losses[-1])):
            raise RuntimeError(
                f"{type(model).__name__} is not checked: its loss on noise is {losses[-1]} "
                + ("from its initial weights" if step == 0 else f"after {step} steps")
            )
    return losses


def _classes(module: nn.Module) -> int:
    """How many classes all parts of a module know."""
    found = (getattr(part, "num_classes", None) for part in module.modules())
    return min((n for n in found if isinstance(n, int) and n > 0), default=1)


def _label(model: nn.Module, shape: tuple[int, int], generator: torch.Generator) -> Any:
    """A label, or with mmpretrain's MultiTaskHead one for each task."""
    from mmpretrain.structures import DataSample, MultiTaskDataSample

    tasks = getattr(getattr(model, "head", model), "task_heads", None)
    if tasks is not None:
        sample = MultiTaskDataSample()
        for name, head in tasks.items():
            sample.set_field(_label(head, shape, generator), name)
        return sample
    label = int(torch.randint(_classes(model), (), generator=generator))
    return DataSample(metainfo=dict(img_shape=shape, ori_shape=shape)).set_gt_label(label)


def _boxes(shape: tuple[int, int], classes: int, generator: torch.Generator, index: int, masks: bool) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData, PixelData

    height, width = shape
    n = 3
    size = 0.2 + 0.4 * torch.rand(n, 2, generator=generator)
    corner = torch.rand(n, 2, generator=generator) * (1 - size)
    boxes = torch.cat([corner, corner + size], 1) * torch.tensor([width, height, width, height])
    labels = torch.randint(classes, (n,), generator=generator)
    meta = dict(
        img_id=index,
        img_shape=shape,
        ori_shape=shape,
        batch_input_shape=shape,
        pad_shape=shape,
        scale_factor=(1.0, 1.0),
    )
    sample = DetDataSample(metainfo=dict(meta, flip=False, flip_direction=None))
    sample.gt_instances = InstanceData(bboxes=HorizontalBoxes(boxes), labels=labels)
    if masks:
        bitmaps = torch.zeros(n, height, width, dtype=torch.uint8)
        for bitmap, (x1, y1, x2, y2) in zip(bitmaps, boxes.long().tolist(), strict=True):
            bitmap[y1 : y2 + 1, x1 : x2 + 1] = 1
        sample.gt_instances.masks = BitmapMasks(bitmaps.numpy(), height, width)
    sample.ignored_instances = InstanceData(bboxes=HorizontalBoxes(boxes[:0]), labels=labels[:0])
    sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, height, width, dtype=torch.long))
    return sample
