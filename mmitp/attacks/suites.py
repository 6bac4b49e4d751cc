"""Bridges to attack suites, which want a classifier on images in [0, 1] that returns logits."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmitp.attacks.arguments import check_arguments
from mmitp.attacks.mode import attack_mode
from mmitp.pruning.verify import eval_mode

SuiteNorm = Literal["Linf", "L2", "L1"]
SuiteVersion = Literal["standard", "plus", "rand", "custom"]
SuiteAttack = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]


def pick_logits(output: Any) -> Any:
    """The logits in a classifier's output: of several outputs the last, of named ones ``logits``, else it itself."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, (tuple, list)) and output:
        return pick_logits(output[-1])
    return getattr(output, "logits", output)


class NormalizedClassifier(nn.Module):
    """A classifier on images in [0, 1] made from one that takes normalised images.

    ``forward(x) = model((x * pixel_range - mean) / std)``. The model's parameters are shared, and its mode is its own.

    Args:
        model: maps ``(N, C, H, W)`` normalised images to logits ``(N, K)``, or to what :func:`pick_logits` finds them
            in.
        mean: per-channel mean in the units of ``pixel_range``, in the model's channel order (or one number for all).
        std: per-channel standard deviation, likewise.
        pixel_range: value of full white in those units: 255 for mean and std of uint8 images, 1 for images in [0, 1].

    Raises:
        ValueError: if ``std`` is not positive, a value is not finite, or mean and std differ in length.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], *, pixel_range: float = 255.0
    ) -> None:
        super().__init__()
        finite = all(math.isfinite(value) for value in (*mean, *std))
        if len(mean) != len(std) or not finite or any(value <= 0 for value in std):
            raise ValueError(
                f"mean and std need the same length, finite values and a positive std, got mean={mean}, std={std}"
            )
        if not (math.isfinite(pixel_range) and pixel_range > 0):
            raise ValueError(f"pixel_range, the value of full white, must be positive and finite, got {pixel_range!r}")
        self.model = model
        self.pixel_range = pixel_range
        self.register_buffer("mean", torch.tensor([float(value) for value in mean]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([float(value) for value in std]).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return pick_logits(self.model((x * self.pixel_range - self.mean) / self.std))


@dataclass
class AutoAttackResult:
    """What AutoAttack found.

    Attributes:
        clean: share of images classified correctly, in [0, 1].
        robust: share still correct after every attack.
        images: number of images.
        attacks: names of the attacks that ran.
        flags: the suite's own warnings that the figure may be unreliable (randomised or dynamic model, zero gradients,
            probabilities where logits are wanted, square attack stronger than the gradient ones). Print them with it.
        adversarial: the adversarial images ``(N, C, H, W)``, equal to the clean one where no attack worked.
    """

    clean: float
    robust: float
    images: int
    attacks: list[str]
    flags: list[str] = field(default_factory=list)
    adversarial: Tensor | None = None


def autoattack_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: SuiteNorm = "Linf",
    version: SuiteVersion = "standard",
    attacks: Sequence[str] | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> AutoAttackResult:
    """Accuracy under AutoAttack (Croce & Hein 2020), run by its authors' package.

    With ten classes or more this is AutoAttack as published; with fewer, the targeted attacks aim at the classes there
    are, and a flag says so.

    Args:
        model: classifier on images in [0, 1] (see :class:`NormalizedClassifier`) that returns logits ``(N, K)``, or
            what :func:`pick_logits` finds them in; run in eval mode. The suite computes in float32; a model in another
            precision gets its images, and gives its logits, through a conversion.
        x: images ``(N, C, H, W)`` in [0, 1], floating point.
        y: class indices ``(N,)``, of any integer type.
        eps: radius in [0, 1] units (8/255 for "eps 8").
        norm: threat model.
        version: the suite's version; ``"custom"`` runs ``attacks`` alone.
        attacks: for ``"custom"``: of ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t``, ``square``.
        batch_size: images at a time.
        seed: seed of every attack.
        device: where to run; the model's own by default.

    Raises:
        ImportError: without the package; ``pip install -e ".[autoattack]"``.
        ValueError: for images outside [0, 1], an empty batch, labels or logits of another kind, an ``eps`` in other
            units, ``attacks`` that do not fit ``version``, or a model with too few classes for the DLR loss (fewer than
            4 targeted, fewer than 3 untargeted).
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError('AutoAttack needs its authors\' package: pip install -e ".[autoattack]"') from error
    _check_suite(eps, norm, version, attacks, batch_size)
    _check_data(x, y)
    if device is None:
        device = next(iter(model.parameters()), x).device
    images, labels = x.float(), y.long()
    logits = _Float32Logits(model)

    tracer = sys.gettrace()
    try:
        # Frozen, because the suite's FAB calls backward() and would leave gradients on the parameters.
        with eval_mode(model), _SuiteLog() as log, attack_mode(model, freeze=True):
            with torch.no_grad():
                classes = logits(images[:1].to(device)).shape[1]
            if int(labels.max()) >= classes or int(labels.min()) < 0:
                raise ValueError(
                    f"the labels lie between {int(labels.min())} and {int(labels.max())}, and {type(model).__name__} "
                    f"knows {classes} classes: labels are class indices, from 0"
                )
            suite = AutoAttack(
                logits,
                attacks=list(attacks) if attacks else None,
                eps=eps,
                norm=norm,
                seed=seed,
                version=version,
                device=device,
            )
            log.flags += _fit_targets(suite, classes)
            clean = _accuracy(logits, images, labels, batch_size, device)
            found, _ = suite.run_standard_evaluation(images, labels, batch_size=batch_size)
            robust = _accuracy(logits, found, labels, batch_size, device)
    finally:
        # Its check for dynamic models leaves tracing off, which ends a debugger's or a coverage tool's watch.
        sys.settrace(tracer)
    adversarial = torch.where(found == images, x, found.to(x.dtype)).detach()
    ran = [str(name) for name in suite.attacks_to_run]
    return AutoAttackResult(clean, robust, len(x), ran, list(dict.fromkeys(log.flags)), adversarial)


def _check_suite(eps: float, norm: str, version: str, attacks: Sequence[str] | None, batch_size: int) -> None:
    check_arguments(eps=eps)
    for name, value, allowed in (("norm", norm, get_args(SuiteNorm)), ("version", version, get_args(SuiteVersion))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if norm == "Linf" and eps > 1:
        raise ValueError(f"eps={eps:g} is in units of images in [0, 1], where 1 takes black to white: 8/255 for eps 8")
    if (version == "custom") != bool(attacks):
        raise ValueError("give attacks together with version='custom', and only with it")
    unknown = [attack for attack in attacks or () if attack not in get_args(SuiteAttack)]
    if unknown:
        raise ValueError(f"attacks must be of {get_args(SuiteAttack)}, got {unknown}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _check_data(x: Tensor, y: Tensor) -> None:
    if not len(x) or len(x) != len(y):
        raise ValueError(f"AutoAttack needs one label an image and at least one image, got {len(x)} and {len(y)}")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"images must be floating point, (N, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"labels must be class indices, integers of shape (N,), got {y.dtype} of shape {tuple(y.shape)}: one-hot "
            "labels go through argmax(1), a column through [:, 0]"
        )
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"images must lie in [0, 1], got [{x.min():.3f}, {x.max():.3f}]: undo the normalisation first")


class _Float32Logits(nn.Module):
    """What the suite can work with: float32 images to float32 logits, whatever the model's precision and output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        state = [*model.parameters(), *model.buffers()]
        self.dtype = next((value.dtype for value in state if value.is_floating_point()), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x.to(self.dtype))
        logits = pick_logits(output)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
            keys = f" with the keys {list(output)}" if isinstance(output, Mapping) else ""
            raise ValueError(
                f"AutoAttack takes logits of shape ({len(x)}, classes) for {len(x)} images, and "
                f"{type(self.model).__name__} returns {got}{keys}: wrap it in a module whose forward returns the "
                "logits, or {'logits': ...}"
            )
        return logits.float()


def _fit_targets(suite: Any, classes: int) -> list[str]:
    names = set(suite.attacks_to_run)
    needed = 4 if "apgd-t" in names else 3 if "apgd-dlr" in names else 2
    if classes < needed:
        raise ValueError(
            f"{sorted(names)} need a classifier of at least {needed} classes (DLR loss), got {classes}: "
            "use version='custom' with attacks=['apgd-ce', 'fab', 'square'] of autoattack_accuracy, or take PGD"
        )
    flags = []
    for attack, name in ((suite.apgd_targeted, "apgd-t"), (suite.fab, "fab-t")):
        if name in names and attack.n_target_classes > classes - 1:
            flags.append(f"{name} aims at {classes - 1} classes, not the published {attack.n_target_classes}")
            attack.n_target_classes = classes - 1
    return flags


def _accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int, device: torch.device | str) -> float:
    with torch.no_grad():
        right = [
            (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()
            for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True)
        ]
    return sum(right) / len(x)


class _SuiteLog(logging.Handler):
    """Collects the suite's warnings, which it only logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.flags: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # The document it names is not part of the package.
        self.flags.append(record.getMessage().split(" See flags_doc.md")[0].strip())

    def __enter__(self) -> _SuiteLog:
        logging.getLogger("auto-attack").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("auto-attack").removeHandler(self)
