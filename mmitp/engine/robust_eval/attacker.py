"""A model whose preprocessor hands out attacked images, until a block ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.dist import get_rank
from torch import Tensor, nn

from mmitp.attacks import attack_mode, cross_entropy, fgsm_rs, pgd
from mmitp.attacks.gradient import LossFn
from mmitp.engine.attack import (
    ImageBatch,
    PixelUnits,
    check_pixel_range,
    class_labels,
    image_area,
    is_multi_label,
    logits_of,
    pixel_units,
    samples_of,
    seeded_generator,
    unwrap,
)
from mmitp.engine.robust_eval.classification import (
    FOR_CLASSIFIERS,
    NOT_FOR_CLASSIFIERS,
    NOT_FOR_MULTI_LABEL,
    run_autoattack,
)
from mmitp.engine.robust_eval.settings import EvalAttack
from mmitp.pruning.rng import kept_rng


@dataclass
class AttackLog:
    """What an attack did: batches seen, AutoAttack's flags, and the largest change made to an image in pixels/255."""

    batches: int = 0
    flags: list[str] = field(default_factory=list)
    largest: float = 0.0


@contextmanager
def attacked(model: nn.Module, attack: EvalAttack, eps: float, dataset: Any = None) -> Iterator[AttackLog]:
    """Attack every batch that the model's preprocessor prepares for testing, until the block ends.

    The attack sees the preprocessor's output, moves each image by at most ``eps`` pixels/255 inside the range of valid
    pixels and outside the padding, and hands the rest on as it is: data samples, and so the metric's ground truth, are
    not touched; neither are parameters' gradients, BatchNorm statistics and the global random state.

    Args:
        model: mmengine model, wrapped or not, in eval mode by the time data comes.
        attack: the attack.
        eps: its size, pixels/255 (l2: radius in the same unit).
        dataset: the test set; detectors attacked on the ground truth need it to know the boxes' coordinates.

    Yields:
        The log, which fills while batches pass.

    Raises:
        ValueError: (while data passes) for models or data that the attack does not fit.
    """
    attack.check([eps])
    attacker = _Attacker(unwrap(model), attack, eps, dataset)
    handle = unwrap(model).data_preprocessor.register_forward_hook(attacker, with_kwargs=True)
    try:
        yield attacker.log
    finally:
        handle.remove()


class _Attacker:
    """Forward hook of a data preprocessor."""

    def __init__(self, model: Any, attack: EvalAttack, eps: float, dataset: Any) -> None:
        self.model, self.attack, self.eps, self.dataset = model, attack, eps, dataset
        self.log = AttackLog()
        self._original: bool | None = None
        self._fits = False

    def __call__(self, preprocessor: nn.Module, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        inputs = output.get("inputs") if isinstance(output, dict) else None
        if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
            raise ValueError(
                "an evaluation attack needs one floating-point image batch (N, C, H, W), the preprocessor's "
                f"output['inputs']; got {type(inputs).__name__ if not isinstance(inputs, Tensor) else inputs.dtype}"
            )
        if self.model.training:
            raise ValueError("evaluation attacks want the model in eval mode")
        images = ImageBatch.find(output).precise()
        units = pixel_units(preprocessor, images, pixel_range=self.attack.pixel_range)
        raw = kwargs.get("data", args[0] if args else None)
        area = _image_area(inputs, samples_of(output), raw.get("inputs") if isinstance(raw, dict) else None)
        self._fits = self._fits or check_pixel_range(images, units, self.attack.pixel_range, area)
        generator = seeded_generator(self.attack.seed, get_rank(), self.log.batches, inputs.device)
        with (
            attack_mode(self.model, freeze=True),
            torch.autocast(device_type=inputs.device.type, enabled=False),
            # Some losses draw (two-stage detectors sample proposals): from the attack's seed, and only then.
            kept_rng(generator.initial_seed()),
        ):
            data = {**output, "inputs": images}
            perturb = self._suite if self.attack.name == "autoattack" else self._gradient
            adversarial = perturb(data, units, area, generator)
        self.log.batches += 1
        change = ((adversarial - data["inputs"]) / units.unit).flatten(1)
        norms = change.norm(dim=1) if self.attack.norm == "l2" else change.abs().amax(1)
        largest = norms.max().item()
        if not math.isfinite(largest):
            # A network that is shown NaN answers class 0, or nothing, which would count.
            raise ValueError(
                f"batch {self.log.batches} of the test holds images with NaN or infinite values: look at the data set "
                "and at the preprocessor's mean and std"
            )
        self.log.largest = max(self.log.largest, largest)
        return {**output, "inputs": adversarial.to(inputs.dtype)}

    def _gradient(
        self, data: dict[str, Any], units: PixelUnits, area: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        attack, x, loss_fn = self.attack, data["inputs"], self._loss_fn(data)
        eps, alpha = self.eps * units.unit, attack.step(self.eps) * units.unit
        if area is not None:
            eps = eps * area
        box: dict[str, Any] = dict(low=units.low, high=units.high, generator=generator)
        if attack.name == "fgsm_rs":
            return fgsm_rs(loss_fn, x, eps=eps, alpha=alpha, **box)
        if attack.name == "fgsm":
            return pgd(loss_fn, x, eps=eps, alpha=alpha, steps=1, random_start=False, norm=attack.norm, **box)
        return pgd(
            loss_fn, x, eps=eps, alpha=alpha, steps=attack.steps, restarts=attack.restarts, norm=attack.norm, **box
        )

    def _suite(
        self, data: dict[str, Any], units: PixelUnits, area: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        labels = class_labels(samples_of(data), self.model)
        if labels is None:
            raise ValueError(self._not_classified(FOR_CLASSIFIERS))
        if area is not None:
            raise ValueError("AutoAttack cannot leave padding alone: batch images of one size, or take pgd")
        found, flags = run_autoattack(self.model, data["inputs"], labels, units, self.eps, self.attack)
        self.log.flags += [flag for flag in flags if flag not in self.log.flags]
        return found

    def _not_classified(self, otherwise: str) -> str:
        return NOT_FOR_MULTI_LABEL.format(type(self.model.head).__name__) if is_multi_label(self.model) else otherwise

    def _loss_fn(self, data: dict[str, Any]) -> LossFn:
        samples = samples_of(data)
        labels = class_labels(samples, self.model)
        if labels is not None:
            if self.attack.objective != "truth":
                raise ValueError(NOT_FOR_CLASSIFIERS.format(self.attack.objective))
            return cross_entropy(logits_of(self.model), labels)
        if not samples or not hasattr(samples[0], "gt_instances"):
            raise ValueError(
                self._not_classified(
                    "evaluation attacks know classifiers (one gt_label a sample) and detectors (gt_instances); the "
                    f"data samples of {type(self.model).__name__} have neither"
                )
            )
        # Only detectors need mmdet.
        from mmitp.engine.detector_attack import boxes_are_original, detector_loss

        objective = self.attack.objective
        if objective == "truth" and self._original is None:
            self._original = boxes_are_original(self.dataset)
        return detector_loss(
            self.model,
            data,
            objective,
            original=bool(self._original),
            score_thr=self.attack.score_thr,
            per_image=self.attack.restarts > 1,
        )


def _image_area(inputs: Tensor, samples: Any, raw: Any) -> Tensor | None:
    """:func:`image_area`, less the canvas that RandomCenterCropPad (mmdet's CenterNet) puts test images on."""
    area = image_area(inputs, samples, raw)
    borders = [getattr(sample, "metainfo", {}).get("border") for sample in samples or ()]
    if any(border is not None for border in borders):
        area = inputs.new_ones(len(inputs), 1, *inputs.shape[-2:]) if area is None else area
        for image, border in zip(area, borders, strict=True):
            if border is not None:
                top, bottom, left, right = (int(value) for value in border)
                inside = torch.zeros_like(image)
                inside[:, top:bottom, left:right] = 1
                image *= inside
    return area
