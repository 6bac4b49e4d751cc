"""How an attack meets an mmengine model: pixel units, the image box, padding, and the loss to raise.

The mathematics is :mod:`mmitp.attacks`'; this file translates between it and the data a preprocessor hands out.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from mmengine.model import is_model_wrapper
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmitp.attacks import pick_logits

_DARK = 4.5
"""Brightest value, in pixels/255, of an image that counts as all but black: those in units of mean and std are, too."""

_DARK_LEVELS = 16
"""An 8-bit image that dark has at most five grey levels a channel; one on another scale has many more."""

_FAR = (-128.0, 432.0)
"""How far, in pixels/255, augmentations in floating point reach (mmdet's PhotoMetricDistortion, which clips nothing:
saturated colours at half the brightness below black, (255 + 32) * 1.5 above white)."""

_STRAY = 0.01
"""Share of values that may lie where no image of the range has any."""


@dataclass(frozen=True)
class ImageBatch:
    """The images of a preprocessed batch as one tensor, and the way back into the batch.

    Attributes:
        data: the batch, as the model takes it: a dict (``model(**data)``) or a sequence (``model(*data)``).
        key: where in it the images are.
        images: ``(N, C, H, W)``. Images that come as a list are padded with 0 at the right and at the bottom.
        sizes: of a list, each image's height and width; else ``None``.
    """

    data: Any
    key: Any
    images: Tensor
    sizes: list[tuple[int, int]] | None = None

    @classmethod
    def find(cls, data: Any) -> ImageBatch:
        """Find the images: a dict's ``inputs``, else the only entry that is a batch of images.

        A batch of images is a floating-point tensor ``(N, C, H, W)`` (``inputs`` may have other dimensions behind its
        channels), or a list of floating-point images ``(C, H, W)`` of one number of channels.

        Raises:
            ValueError: there is none, or more than one.
        """
        entries: dict[Any, Any] = {}
        if isinstance(data, Mapping):
            entries = {"inputs": data["inputs"]} if "inputs" in data else dict(data)
        elif isinstance(data, (list, tuple)):
            entries = dict(enumerate(data))
        found = [key for key, value in entries.items() if _are_images(value, any_size=key == "inputs")]
        if len(found) != 1:
            seen = ", ".join(f"{key!r}: {_describe(value)}" for key, value in entries.items()) or _describe(data)
            raise ValueError(
                "an attack needs one batch of floating-point images, a tensor (N, C, H, W) or a list of (C, H, W), as "
                "the data preprocessor's output['inputs'] or as the only such entry of its output; "
                f"{len(found) or 'none'} found in {{{seen}}}. Images that the model itself turns into floating point, "
                "and several inputs, are not supported: let the data preprocessor normalise the images and hand them "
                "out as one entry"
            )
        value = entries[found[0]]
        if isinstance(value, Tensor):
            return cls(data, found[0], value)
        sizes = [(image.shape[-2], image.shape[-1]) for image in value]
        height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
        packed = value[0].new_zeros(len(value), value[0].shape[0], height, width)
        for image, place, (h, w) in zip(value, packed, sizes, strict=True):
            place[:, :h, :w] = image
        return cls(data, found[0], packed, sizes)

    def replaced(self, images: Tensor) -> Any:
        """The batch with other ``images`` (gradients flow through), of the type and precision it had."""
        cast = images.to(self.images.dtype)
        value: Any = cast
        if self.sizes is not None:
            parts = [image[:, :h, :w] for image, (h, w) in zip(cast, self.sizes, strict=True)]
            value = type(self.data[self.key])(parts)
        if isinstance(self.data, Mapping):
            return {**self.data, self.key: value}
        items = [value if index == self.key else item for index, item in enumerate(self.data)]
        return type(self.data)(*items) if hasattr(self.data, "_fields") else type(self.data)(items)

    def precise(self) -> Tensor:
        """The images in the precision they are attacked in: float32 at least, since half loses small gradients."""
        return self.images if self.images.dtype == torch.float64 else self.images.float()


def _are_images(value: Any, any_size: bool) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and (value.dim() == 4 or (any_size and value.dim() > 1))
    if not isinstance(value, (list, tuple)) or not value or hasattr(value, "_fields"):
        return False
    images = [v for v in value if isinstance(v, Tensor) and v.is_floating_point() and v.dim() == 3]
    return len(images) == len(value) and len({len(image) for image in images}) == 1


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (list, tuple)) and value:
        return f"{type(value).__name__} of {_describe(value[0])}"
    return type(value).__name__


def samples_of(data: Any) -> Sequence[Any] | None:
    """The data samples of a batch, ``None`` where it has none (a sequence, or labels that are plain tensors)."""
    samples = data.get("data_samples") if isinstance(data, Mapping) else None
    return samples if isinstance(samples, (list, tuple)) else None


def raw_images(raw: Any, key: Any) -> Any:
    """What stands in a data loader's batch where the preprocessor's output has its images; ``None`` if nothing does."""
    if isinstance(raw, Mapping):
        return raw.get(key)
    return raw[key] if isinstance(raw, (list, tuple)) and isinstance(key, int) and key < len(raw) else None


def nonfinite_image(images: Any) -> int | None:
    """Number, in its batch, of the first image on the host that holds NaN or an infinite value.

    Images on an accelerator are not looked at: reading them would make the training step wait.
    """
    for index, image in enumerate(images if isinstance(images, (list, tuple, Tensor)) else ()):
        readable = isinstance(image, Tensor) and image.device.type == "cpu" and image.is_floating_point()
        if readable and not bool(torch.isfinite(image).all()):
            return index
    return None


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


def check_pixel_range(inputs: Tensor, units: PixelUnits, pixel_range: float, area: Tensor | None = None) -> bool:
    """Refuse a batch that cannot be what ``pixel_range`` says.

    Args:
        inputs: the preprocessed images.
        units: their pixel units.
        pixel_range: full white before normalisation, as it is claimed.
        area: where the images are, see :func:`image_area`: padding may have any value.

    Returns:
        Whether the batch shows that it is. One that is all but black fits several ranges: ask the next one.

    Raises:
        ValueError: if most values lie outside the image box or some far outside, if the images are all but black and
            yet have values below black or more grey levels than an image of that range can have (as those that the
            pipeline normalises), or for a mean and std that make no image box.
    """
    span = units.high - units.low
    if not bool((torch.isfinite(units.low) & torch.isfinite(units.high) & (span > 0)).all()):
        raise ValueError(
            f"the preprocessor's mean and std make no image box: black is {units.low.flatten().tolist()}, full white "
            f"{units.high.flatten().tolist()}. The mean must be finite, and the std finite and positive"
        )
    known = ~torch.isnan(inputs) if area is None else ~torch.isnan(inputs) & (area > 0)
    pixels = torch.where(known, (inputs - units.low) / span * 255, 0.0)
    counted = max(known.sum().item(), 1)
    share = ((pixels < -1) | (pixels > 256)).sum().item() / counted
    far = ((pixels < _FAR[0]) | (pixels > _FAR[1])).sum().item() / counted
    brightest = pixels.max().item()
    dark = not brightest > _DARK
    # Between the two limits are augmented images; around black is no room for any.
    misfit = share > 0.5 or far > _STRAY or (dark and (share > _STRAY or _grey_levels(pixels) > _DARK_LEVELS))
    if misfit:
        raise ValueError(
            f"the preprocessed images do not fit pixel_range={pixel_range}: {share:.0%} of the values lie outside "
            f"the image box, the brightest is {brightest:.3g}/255. Set pixel_range to the value of full white before "
            "normalisation (1.0 for a pipeline that scales images to [0, 1]), and check the preprocessor's mean and "
            "std: an attack has to know them, so the preprocessor normalises, not the pipeline"
        )
    return not dark


def _grey_levels(pixels: Tensor) -> int:
    """The most grey levels that a channel of an image has, told apart to 1/100 of one."""
    return max(torch.unique((channel * 100).round()).numel() for image in pixels for channel in image)


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
        meta = getattr(data_samples[index], "metainfo", {}) if isinstance(data_samples, (list, tuple)) else {}
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


def training_loss(model: nn.Module, data: Any, losses: Sequence[str] | None = None) -> Callable[[Tensor], Tensor]:
    """``loss_fn`` raising the model's own training loss (a scalar, the batch's mean).

    Detectors get new data samples each time, because some heads alter them. Their tensors are copied once in all: the
    copies are lent out again unless a head has written into them.

    Args:
        model: unwrapped mmengine model.
        data: the preprocessor's output; its images are what the attack replaces, see :class:`ImageBatch`.
        losses: see :func:`select_losses`.
    """
    batch = ImageBatch.find(data)
    samples = samples_of(data)
    lent = None
    if samples is not None and len(samples) > 0 and hasattr(samples[0], "gt_instances"):
        lent = _LentSamples(samples)
    scored = _floating_scores(samples)

    def loss_fn(x: Tensor) -> Tensor:
        attacked = batch.replaced(x)
        if lent is not None:
            attacked["data_samples"] = lent.again()
        elif scored is not None:
            attacked["data_samples"] = scored
        output = model(**attacked, mode="loss") if isinstance(attacked, Mapping) else model(*attacked, mode="loss")
        return select_losses(output, losses)

    return loss_fn


def _floating_scores(samples: Sequence[Any] | None) -> list[Any] | None:
    """The samples with floating-point scores where they have whole numbers, else None.

    mmpretrain's preprocessor with batch augmentations hands out scores: mixed ones in training, else one-hot integers,
    which losses on mixed ones do not take.
    """
    scores = [getattr(sample, "gt_score", None) for sample in samples or ()]
    if samples is None or all(not isinstance(score, Tensor) or score.is_floating_point() for score in scores):
        return None
    scored = [copy.copy(sample) for sample in samples]
    for sample, score in zip(scored, scores, strict=True):
        if isinstance(score, Tensor):
            vars(sample)["gt_score"] = score.float()
    return scored


class _LentSamples:
    """Data samples for one pass after another, each as the first: what a pass does to its own is not seen by the next.

    New containers around the same tensors, which are copied where a pass has written into them, as their version
    counters tell. What else there is (masks in numpy) is copied each time.
    """

    def __init__(self, samples: Sequence[Any]) -> None:
        self._given = samples
        self._own: Any = None
        self._versions: list[tuple[Tensor, int]] = []

    def again(self) -> Any:
        if self._own is None or any(tensor._version != version for tensor, version in self._versions):
            self._own = copy.deepcopy(self._given)
        self._versions = []
        return self._around(self._own)

    def _around(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_inference():
            return value.clone()  # it has no counter
        if isinstance(value, Tensor):
            self._versions.append((value, value._version))
            return value
        if isinstance(value, BaseDataElement):
            new = copy.copy(value)
            new.__dict__.update({key: self._around(item) for key, item in value.__dict__.items()})
            return new
        if type(value) is dict:
            return {key: self._around(item) for key, item in value.items()}
        if type(value) in (list, tuple, set):
            return type(value)(self._around(item) for item in value)
        return copy.deepcopy(value)


def is_multi_label(model: nn.Module) -> bool:
    """Whether it is one of mmpretrain's multi-label classifiers: their samples may have one label each by chance."""
    heads = sys.modules.get("mmpretrain.models.heads")  # not imported: then no head is one of its
    return heads is not None and isinstance(getattr(unwrap(model), "head", None), heads.MultiLabelClsHead)


def class_labels(samples: Sequence[Any] | None, model: nn.Module) -> Tensor | None:
    """Class indices ``(N,)`` if every sample has exactly one ``gt_label``; ``None`` for multi-label classifiers."""
    if is_multi_label(model):
        return None
    listed = samples if isinstance(samples, (list, tuple)) else ()
    labels: list[Any] = [getattr(sample, "gt_label", None) for sample in listed]
    if not labels or any(not isinstance(label, Tensor) or label.numel() != 1 for label in labels):
        return None
    return torch.cat([label.flatten() for label in labels])


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A classifier's logits ``(N, K)`` as a function of its normalised input; of several outputs the last counts.

    Raises:
        ValueError: (the function returned) where ``mode="tensor"`` gives no ``(N, K)`` tensor.
    """

    def predict(x: Tensor) -> Tensor:
        output = pick_logits(model(x, mode="tensor"))
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
