"""An example input for the channel graph, in the form the model at hand takes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmitp.pruning.rng import kept_rng
from mmitp.pruning.verify import call_model, eval_mode


def example_inputs(model: nn.Module, data_batch: Any, input_shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """Keyword arguments for one ``mode='tensor'`` forward pass of an OpenMMLab model, batch size one.

    Args:
        model: unwrapped model with a ``data_preprocessor``.
        data_batch: a batch of the training loader; gives the image size and, for two-stage detectors, data samples.
        input_shape: (H, W) in pixels the operations are to be stated for; by default that of the batch.

    Raises:
        ValueError: the batch has no image tensor.
    """
    # The preprocessor may draw random numbers (batch augmentations, multi-scale): leave the training's sequence alone.
    with kept_rng():
        batch = model.data_preprocessor(copy.deepcopy(data_batch), False)  # type: ignore[operator]
    images = batch.get("inputs") if isinstance(batch, dict) else None
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise ValueError(
            f"expected the data preprocessor of {type(model).__name__} to return an image batch of shape (N, C, H, W) "
            f"under 'inputs', got {type(images).__name__}"
        )
    height, width = input_shape or images.shape[-2:]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, images.shape[1], height, width, generator=generator).to(**_kind(model))
    if images.is_floating_point():
        x = x.to(images.dtype)
    samples = batch.get("data_samples")
    return dict(inputs=x, data_samples=samples[:1] if samples is not None else None, mode="tensor")


def _kind(model: nn.Module) -> dict[str, Any]:
    """Device and precision of a model's weights."""
    parameters = list(model.parameters())
    found = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    return dict(device=parameters[0].device if parameters else found.device, dtype=found.dtype)


def blank_example(
    model: nn.Module, shape: tuple[int, int], channels: int | None = None, batch: int = 1
) -> dict[str, Any]:
    """An example without a batch at hand: noise of (batch, channels, H, W), and empty data samples for detectors.

    Args:
        model: unwrapped model.
        shape: (H, W) in pixels.
        channels: of the images; by default :func:`image_channels`.
        batch: number of images.
    """
    if channels is None:
        channels = image_channels(model, shape)
    x = torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(0))
    x = x.to(**_kind(model))
    samples = None
    if hasattr(model, "add_pred_to_datasample"):
        from mmdet.structures import DetDataSample  # only detectors need it
        from mmengine.structures import InstanceData

        meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
        # Sparse R-CNN assigns boxes in any forward pass, and takes an image without any
        none = dict(bboxes=x.new_zeros(0, 4), labels=torch.zeros(0, dtype=torch.long, device=x.device))
        samples = [DetDataSample(metainfo=meta, gt_instances=InstanceData(**none)) for _ in range(batch)]
    return dict(inputs=x, data_samples=samples, mode="tensor")


def image_channels(model: nn.Module, shape: tuple[int, int]) -> int:
    """How many channels the model's images have, where no batch and no checkpoint says it.

    The means of the data preprocessor and the first convolution tell it. Where they do not agree (one mean for all
    channels, images that are cut into patches before the first convolution, several stems) the model is tried out.

    Args:
        model: unwrapped model.
        shape: (H, W) in pixels to try it with.

    Raises:
        ValueError: it runs with none of the numbers that come into question.
    """
    mean = getattr(getattr(model, "data_preprocessor", None), "mean", None)
    means = mean.numel() if isinstance(mean, Tensor) else None
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return means or 3
    stem = len(first.weight[0]) if getattr(first, "in_index", None) is None else None  # else it reads a part of them
    if stem == means or means in (None, 1) and stem in (1, 3):
        return stem or 3
    tried = list(dict.fromkeys(n for n in (means if means != 1 else None, stem, 3, means) if n is not None))
    errors = []
    for channels in tried:
        try:
            with eval_mode(model), kept_rng(), torch.no_grad():
                model(**blank_example(model, shape, channels))
        except Exception as error:  # a wrong number may break any line of a model's code
            errors.append(f"{channels}: {type(error).__name__}: {error}")
        else:
            return channels
    raise ValueError(
        f"cannot tell how many channels the images of {type(model).__name__} have; tried " + "; ".join(errors)
    )


def second_example(model: nn.Module, shape: tuple[int, int], channels: int | None = None) -> dict[str, Any] | None:
    """A blank example of another size and batch, to see that a slimmed network is right there too.

    Args:
        model: the model; its mode and the state of random numbers stay.
        channels: of the images; by default as :func:`blank_example` finds out.
        shape: (H, W) of the first example. The second has about three quarters of it, and a batch of two.

    Returns:
        The example, or None where the model does not run on it (as those of one fixed size).
    """
    other = tuple(side * 3 // 4 // 32 * 32 or 2 * side for side in shape)
    example = blank_example(model, (other[0], other[1]), channels, batch=2)
    try:
        with eval_mode(model), kept_rng(), torch.no_grad():
            call_model(model, example)
    except Exception:  # whatever a foreign model raises on an input that it is not made for
        return None
    return example
