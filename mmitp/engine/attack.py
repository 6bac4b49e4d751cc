"""How an attack meets an mmengine model: pixel units, the image box, padding, and the loss to raise.

The mathematics is :mod:`mmitp.attacks`'; this file translates between it and the data a preprocessor hands out.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from mmengine.model import is_model_wrapper
from torch import Tensor, nn


class PixelUnits(NamedTuple):
    """The pixel scale seen in a preprocessor's output; each broadcasts against ``(N, C, H, W)``.

    Attributes:
        unit: what 1/255 of the full pixel range amounts to, per channel: ``eps = 8 * unit`` is 8/255.
        low: black.
        high: full white.
    """

    unit: Tensor
    low: Tensor
    high: Tensor


def unwrap(model: nn.Module) -> Any:
    """The mmengine model inside a (distributed) wrapper."""
    return model.module if is_model_wrapper(model) else model


def pixel_units(preprocessor: nn.Module, inputs: Tensor, *, pixel_range: float = 255.0) -> PixelUnits:
    """Pixel units of ``inputs`` from the preprocessor's ``mean`` and ``std`` (in its output's channel order).

    Args:
        preprocessor: any mmengine data preprocessor; without ``mean`` and ``std`` the images pass unnormalised.
        inputs: its output ``(N, C, H, W)``.
        pixel_range: full white before normalisation: 255, or 1 where the pipeline already scales images to [0, 1].
    """
    mean, std = getattr(preprocessor, "mean", None), getattr(preprocessor, "std", None)
    if mean is None or std is None or not getattr(preprocessor, "_enable_normalize", True):
        mean, std = inputs.new_zeros(1), inputs.new_ones(1)
    mean, std = (torch.as_tensor(value, dtype=inputs.dtype, device=inputs.device).flatten() for value in (mean, std))
    shape = (1, -1, *[1] * (inputs.dim() - 2))
    low, high = -mean / std, (pixel_range - mean) / std
    return PixelUnits((pixel_range / 255 / std).view(shape), low.view(shape), high.view(shape))


def check_pixel_range(inputs: Tensor, units: PixelUnits, pixel_range: float) -> None:
    """Refuse a batch that cannot be what ``pixel_range`` says.

    Raises:
        ValueError: if most values lie outside the image box, or all images are all but black.
    """
    outside = ((inputs < units.low - units.unit) | (inputs > units.high + units.unit)).float().mean().item()
    brightest = ((inputs - units.low) / (units.high - units.low)).max().item() * 255
    if outside > 0.5 or brightest <= 1.5:
        raise ValueError(
            f"the preprocessed images do not fit pixel_range={pixel_range}: {outside:.0%} of the values lie outside "
            f"the image box, the brightest is {brightest:.3g}/255. Set pixel_range to the value of full white before "
            "normalisation (1.0 for a pipeline that scales images to [0, 1]), and check the preprocessor's mean and std"
        )


def image_area(inputs: Tensor, data_samples: Sequence[Any] | None, raw: Any = None) -> Tensor | None:
    """Where each padded image is: ``(N, 1, H, W)``, 1 inside and 0 over the padding at the right and at the bottom.

    A detector's samples say so themselves (``img_shape``, which batch augmentations keep up to date, beside
    ``batch_input_shape``); elsewhere the unpadded images ``raw`` that went into the preprocessor do.

    Returns:
        ``None`` where no image is padded. Padding that the pipeline itself puts in is part of the image.
    """
    if inputs.dim() != 4:
        return None
    height, width = inputs.shape[-2:]
    sizes = []
    for index in range(len(inputs)):
        meta = getattr(data_samples[index], "metainfo", {}) if data_samples is not None else {}
        if "img_shape" in meta and "batch_input_shape" in meta:
            sizes.append(tuple(meta["img_shape"][:2]))
        elif raw is not None and len(raw) == len(inputs):
            sizes.append(tuple(raw[index].shape[-2:]))
        else:
            sizes.append((height, width))
    if all(h >= height and w >= width for h, w in sizes):
        return None
    area = inputs.new_zeros(len(inputs), 1, height, width)
    for index, (h, w) in enumerate(sizes):
        area[index, :, :h, :w] = 1
    return area


def select_losses(losses: dict[str, Any], patterns: Sequence[str] | None) -> Tensor:
    """Sum of a model's loss terms, as mmengine sums them (mean of each tensor, keys that contain ``loss``).

    Args:
        losses: a model's ``mode="loss"`` output.
        patterns: keys to keep, shell-style (``"loss_center_heatmap"``, ``"*_cls"``); ``None`` keeps all that train.

    Returns:
        A scalar.

    Raises:
        ValueError: if a pattern matches no key.
    """
    if patterns is None:
        keys = [key for key in losses if "loss" in key]
    else:
        for pattern in patterns:
            if not any(fnmatchcase(key, pattern) for key in losses):
                raise ValueError(f"losses={list(patterns)}: {pattern!r} matches none of the model's {sorted(losses)}")
        keys = [key for key in losses if any(fnmatchcase(key, pattern) for pattern in patterns)]
    terms: list[Tensor] = []
    for key in keys:
        value = losses[key]
        terms.extend([value] if isinstance(value, Tensor) else value)
    return torch.stack([term.float().mean() for term in terms]).sum()


def training_loss(
    model: nn.Module, data: dict[str, Any], losses: Sequence[str] | None = None
) -> Callable[[Tensor], Tensor]:
    """``loss_fn`` raising the model's own training loss (a scalar, the batch's mean).

    Detectors get a copy of the data samples each time, because some heads alter them.

    Args:
        model: unwrapped mmengine model.
        data: the preprocessor's output; ``inputs`` is what the attack replaces.
        losses: see :func:`select_losses`.
    """
    samples = data.get("data_samples")
    annotated = samples is not None and len(samples) > 0 and "gt_instances" in samples[0]

    def loss_fn(x: Tensor) -> Tensor:
        batch = {**data, "inputs": x}
        if annotated:
            batch["data_samples"] = copy.deepcopy(samples)
        return select_losses(model(**batch, mode="loss"), losses)

    return loss_fn


def class_labels(samples: Sequence[Any] | None) -> Tensor | None:
    """Class indices ``(N,)`` if every sample has exactly one ``gt_label``, as single-label classifiers' have."""
    labels: list[Any] = [getattr(sample, "gt_label", None) for sample in samples or ()]
    if not labels or any(label is None or label.numel() != 1 for label in labels):
        return None
    return torch.cat([label.flatten() for label in labels])


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A classifier's logits ``(N, K)`` as a function of its normalised input; of several outputs the last counts.

    Raises:
        ValueError: (the function returned) where ``mode="tensor"`` gives no ``(N, K)`` tensor.
    """

    def predict(x: Tensor) -> Tensor:
        output = model(x, mode="tensor")
        output = output[-1] if isinstance(output, (tuple, list)) else output
        if not isinstance(output, Tensor) or output.dim() != 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"attacking a classifier takes logits of shape (images, classes) from mode='tensor'; "
                f"{type(model).__name__} gives {got}"
            )
        return output

    return predict


def seeded_generator(seed: int, rank: int, index: int, device: torch.device | str) -> torch.Generator:
    """A generator that depends on these numbers alone: ranks and batches differ, and any run repeats them."""
    # Hashed, because the CPU's generator reads 32 bits only: sums and shifts of the three would collide.
    digest = hashlib.blake2b(f"{seed}-{rank}-{index}".encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))
