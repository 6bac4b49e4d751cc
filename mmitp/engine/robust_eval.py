"""A config's own test, clean and under attack: same data, same metric, another image in front of the network."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from mmengine import Config
from mmengine.dist import all_gather_object, get_rank
from mmengine.runner import Runner
from torch import Tensor, nn

from mmitp.attacks import (
    NormalizedClassifier,
    attack_mode,
    autoattack_accuracy,
    check_pixels,
    cross_entropy,
    fgsm_rs,
    pgd,
)
from mmitp.attacks.arguments import Norm
from mmitp.attacks.gradient import LossFn
from mmitp.datasets import EvenSubset
from mmitp.engine.attack import (
    ImageBatch,
    PixelUnits,
    check_pixel_range,
    class_labels,
    image_area,
    logits_of,
    pixel_units,
    seeded_generator,
    unwrap,
)
from mmitp.engine.checkpoint import FitHook
from mmitp.engine.results import set_aside, write_results
from mmitp.engine.run import build_runner
from mmitp.pruning.rng import kept_rng
from mmitp.visualization import plot_robustness

AttackName = Literal["fgsm", "fgsm_rs", "pgd", "autoattack"]
Objective = Literal["truth", "own", "vanishing", "fabrication"]

_FOR_CLASSIFIERS = "AutoAttack is for classifiers with one gt_label a sample: take pgd or fgsm"
_NOT_FOR_CLASSIFIERS = "objective {!r} is for detectors, and these samples have one gt_label each: take 'truth'"


@dataclass(frozen=True)
class EvalAttack:
    """An attack to evaluate under; its size ``eps`` is given apart.

    Args:
        name: ``"fgsm"``: one step of length eps from the image itself; ``"fgsm_rs"``: one step from a random start;
            ``"pgd"``; ``"autoattack"``: the standard version (classifiers only).
        alpha: step in pixels/255, positive; ``None``: 1.25 eps for ``"fgsm_rs"``, eps / 4 for ``"pgd"``. The others
            have none.
        steps: of ``"pgd"``.
        restarts: of ``"pgd"``; each image keeps the run with the highest loss.
        norm: ``"linf"`` or ``"l2"``; ``"fgsm_rs"`` is l-inf only.
        objective: what is raised. ``"truth"``: a classifier's cross-entropy against the label, a detector's training
            loss against the ground truth. Detectors also take ``"own"``, ``"vanishing"`` and ``"fabrication"``, see
            :func:`mmitp.engine.detector_attack.detector_loss`.
        score_thr: least score of a detection that counts for ``"own"``.
        seed: of the random starts, which depend on it and on the batch's number alone: a masked and a slimmed network
            are attacked from the same ones.
        pixel_range: full white before normalisation, 255 or, where the pipeline scales images to [0, 1], 1.

    Raises:
        ValueError: for values that make no attack.
    """

    name: AttackName = "pgd"
    alpha: float | None = None
    steps: int = 20
    restarts: int = 1
    norm: Norm = "linf"
    objective: Objective = "truth"
    score_thr: float = 0.3
    seed: int = 0
    pixel_range: float = 255.0

    def __post_init__(self) -> None:
        for key, allowed in (("name", AttackName), ("norm", Norm), ("objective", Objective)):
            if getattr(self, key) not in get_args(allowed):
                raise ValueError(f"{key} must be one of {get_args(allowed)}, got {getattr(self, key)!r}")
        check_pixels(eps=1.0, alpha=self.alpha, steps=self.steps, restarts=self.restarts, norm=self.norm)
        if self.steps < 1 or not 0 < self.pixel_range < math.inf or not 0 <= self.score_thr <= 1:
            raise ValueError(
                "steps must be at least 1, pixel_range positive and finite, and score_thr in [0, 1], got "
                f"{self.steps}, {self.pixel_range}, {self.score_thr}"
            )
        if self.name == "fgsm_rs" and self.norm != "linf":
            raise ValueError("fgsm_rs is an l-inf attack: take fgsm or pgd for l2")
        if self.alpha is not None and self.name in ("fgsm", "autoattack"):
            raise ValueError(f"{self.name} takes no alpha: its step follows from eps")
        if self.name == "autoattack" and self.objective != "truth":
            raise ValueError(f"AutoAttack is for classifiers and has no objective {self.objective!r}")

    def step(self, eps: float) -> float:
        """Length of a step at size ``eps``, pixels/255."""
        if self.alpha is not None:
            return self.alpha
        return eps * {"fgsm": 1.0, "fgsm_rs": 1.25, "pgd": 0.25}[self.name]

    def check(self, eps: Sequence[float]) -> list[str]:
        """Whether the attack can be made at these sizes, in pixels/255; returns what is allowed but hardly meant.

        Raises:
            ValueError: for no size, one twice, or one that is no size of an attack: negative, not finite, above 255.
        """
        steps = self.steps if self.name == "pgd" else 1
        doubts = [
            doubt for size in eps for doubt in check_pixels(eps=size, alpha=self.alpha, norm=self.norm, steps=steps)
        ]
        if not eps or len(set(eps)) != len(eps):
            raise ValueError(f"eps needs at least one size, none twice, got {list(eps)}")
        return doubts

    def slug(self) -> str:
        """The attack as a part of a file's name: ``pgd20-linf``, ``pgd50x10-l2-own``."""
        count = f"{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "") if self.name == "pgd" else ""
        objective = f"-{self.objective}" if self.objective != "truth" else ""
        return f"{self.name}{count}-{self.norm}{objective}"

    def describe(self) -> str:
        """The attack in one line."""
        if self.name == "autoattack":
            text = f"AutoAttack (standard, {self.norm})"
        elif self.name == "pgd":
            alpha = f"{self.alpha:g}/255" if self.alpha is not None else "eps/4"
            text = f"PGD-{self.steps} ({self.norm}, step {alpha}, restarts {self.restarts})"
        else:
            alpha = f"{self.alpha:g}/255" if self.alpha is not None else "eps" if self.name == "fgsm" else "1.25 eps"
            text = f"{'FGSM' if self.name == 'fgsm' else 'FGSM-RS'} ({self.norm}, step {alpha})"
        own = f" of at least {self.score_thr:g}" if self.objective == "own" else ""
        return f"{text}, objective {self.objective}{own}, seed {self.seed}"


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
        self._fits = self._fits or check_pixel_range(images, units, self.attack.pixel_range)
        raw = kwargs.get("data", args[0] if args else None)
        area = _image_area(inputs, output.get("data_samples"), raw.get("inputs") if isinstance(raw, dict) else None)
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
        x, labels = data["inputs"], class_labels(data.get("data_samples"))
        if labels is None:
            raise ValueError(_FOR_CLASSIFIERS)
        if area is not None:
            raise ValueError("AutoAttack cannot leave padding alone: batch images of one size, or take pgd")
        if self.eps == 0:
            return x
        span = units.high - units.low
        pixels = ((x - units.low) / span).clamp(0, 1)
        classifier = NormalizedClassifier(
            _Logits(self.model), (-units.low / span).flatten().tolist(), (1 / span).flatten().tolist(), pixel_range=1.0
        )
        result = autoattack_accuracy(
            classifier.to(x.device),
            pixels,
            labels,
            eps=self.eps / 255,
            norm="Linf" if self.attack.norm == "linf" else "L2",
            batch_size=len(x),
            seed=self.attack.seed,
        )
        assert result.adversarial is not None
        self.log.flags += [flag for flag in result.flags if flag not in self.log.flags]
        found = result.adversarial.to(x.device)
        return torch.where(found != pixels, found * span + units.low, x)

    def _loss_fn(self, data: dict[str, Any]) -> LossFn:
        samples = data.get("data_samples")
        labels = class_labels(samples)
        if labels is not None:
            if self.attack.objective != "truth":
                raise ValueError(_NOT_FOR_CLASSIFIERS.format(self.attack.objective))
            return cross_entropy(logits_of(self.model), labels)
        if not samples or not hasattr(samples[0], "gt_instances"):
            raise ValueError(
                "evaluation attacks know classifiers (one gt_label a sample) and detectors (gt_instances); the data "
                f"samples of {type(self.model).__name__} have neither"
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


class _Logits(nn.Module):
    """The classifier as a module on normalised images, for suites that look for its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model)(x)


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


@dataclass
class RobustReport:
    """Figures of one model, clean and under an attack of several sizes.

    Attributes:
        attack: the attack.
        eps: its sizes, pixels/255.
        clean: the test's metrics without attack; those that are no single number stay out of table and curve.
        attacked: the same metrics, one dict a size.
        images: images tested.
        total: images of the test set.
        seconds: wall time of the clean test and of each attacked one.
        largest: largest change made to any image at each size, pixels/255.
        flags: AutoAttack's warnings that its figure may be unreliable.
    """

    attack: EvalAttack
    eps: list[float]
    clean: dict[str, Any]
    attacked: list[dict[str, Any]]
    images: int
    total: int
    seconds: list[float]
    largest: list[float]
    flags: list[str]

    def numbers(self) -> list[str]:
        """Names of the metrics that are one number, clean and under every attack."""
        columns = [self.clean, *self.attacked]
        return [name for name in self.clean if all(isinstance(column[name], float) for column in columns)]

    def table(self) -> str:
        """Metrics by rows; clean and each eps by columns."""
        rows = [["", "clean", *(f"eps {eps:g}/255" for eps in self.eps)]]
        for name in self.numbers():
            rows.append([name, *(f"{column[name]:.4g}" for column in [self.clean, *self.attacked])])
        rows.append(["largest change /255", "", *(f"{value:.4g}" for value in self.largest)])
        rows.append(["seconds", *(f"{value:.1f}" for value in self.seconds)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        share = f"all {self.total} images" if self.images == self.total else f"{self.images} of {self.total} images"
        flags = [f"AutoAttack flag: {flag}" for flag in self.flags]
        if not self.clean:
            flags.append("the metrics gave no figure: nothing was detected, with or without attack")
        if self.attack.name == "autoattack" and not flags:
            flags = ["AutoAttack raised no flag"]
        return "\n".join([f"{self.attack.describe()}; {share}", *lines, *flags])

    def save(self, path: str | Path, run: Mapping[str, Any] | None = None) -> list[str]:
        """Writes the figures as JSON and, for more than one eps, their curve beside it (``.png``).

        Args:
            path: of the JSON; former files of the names move aside (:mod:`mmitp.engine.results`).
            run: what was measured with, from :func:`~mmitp.engine.results.provenance`.

        Returns:
            What was written, a line each.
        """
        path = Path(path)
        lines = write_results(path, asdict(self), run or {})
        # A KITTI evaluation gives 19 figures, of which the benchmark ranks by these; COCO's are -1 where no object is.
        names = [name for name in self.numbers() if self.clean[name] != -1]
        names = [name for name in names if name.endswith("R40_moderate")] or names[:6]
        if len(self.eps) == 1 or not names:
            return lines
        points = sorted({0.0: self.clean, **dict(zip(self.eps, self.attacked, strict=True))}.items())
        curves = {name: [metrics[name] for _, metrics in points] for name in names}
        picture = path.with_suffix(".png")
        moved = set_aside(picture)
        plot_robustness([eps for eps, _ in points], curves, picture, title=self.attack.describe())
        return [*lines, f"wrote {picture}", *([f"the former {picture.name} is now {moved}"] if moved else [])]


def evaluate(runner: Runner, attack: EvalAttack, eps: Sequence[float]) -> RobustReport:
    """The runner's own test, clean and then under the attack at each size.

    Args:
        runner: with a test loop; weights are loaded as ``runner.test()`` does.
        attack: the attack.
        eps: sizes in pixels/255, at least one, none twice.

    Raises:
        ValueError: before anything is tested for sizes that make no sweep or an attack that is not for these data; for
            metrics that are no numbers; or as :func:`attacked`.
    """
    for doubt in attack.check(eps):
        runner.logger.warning(doubt)
    _check_kind(runner, attack)
    start = time.perf_counter()
    results = [_figures(runner.test())]
    seconds = [time.perf_counter() - start]
    loader = runner.test_loop.dataloader
    logs = []
    for size in eps:
        start = time.perf_counter()
        # Not runner.test(): before_run would run again, and averaged weights (EMA) be taken anew.
        with attacked(runner.model, attack, size, loader.dataset) as log:
            results.append(_figures(runner.test_loop.run()))
        seconds.append(time.perf_counter() - start)
        logs.append(log)
    gathered = all_gather_object(logs)
    flags = [flag for part in gathered for log in part for flag in log.flags]
    coco = tuple(f"{metric.prefix}/" for metric in runner.test_loop.evaluator.metrics if hasattr(metric, "img_ids"))
    clean, *attacked_results = _complete(results, coco)
    return RobustReport(
        attack=attack,
        eps=[float(size) for size in eps],
        clean=clean,
        attacked=attacked_results,
        images=tested_images(loader),
        total=len(loader.dataset),
        seconds=seconds,
        largest=[max(part[i].largest for part in gathered) for i in range(len(eps))],
        flags=list(dict.fromkeys(flags)),
    )


def _check_kind(runner: Runner, attack: EvalAttack) -> None:
    """Whether the attack is for what the test set's samples carry: its first one is asked."""
    if attack.name != "autoattack" and attack.objective == "truth":
        return
    if attack.name == "autoattack" and find_spec("pyautoattack") is None:
        raise ValueError('AutoAttack needs its authors\' package: pip install "mmitp[autoattack]"')
    dataset = runner.test_loop.dataloader.dataset
    if not len(dataset):
        return
    item = dataset[0]
    samples = [item["data_samples"]] if isinstance(item, dict) and "data_samples" in item else None
    classified = class_labels(samples) is not None
    if classified and attack.objective != "truth":
        raise ValueError(_NOT_FOR_CLASSIFIERS.format(attack.objective))
    if not classified and attack.name == "autoattack":
        raise ValueError(_FOR_CLASSIFIERS)


def tested_images(loader: Any) -> int:
    """How many images of its data set a test's loader reads, all processes together."""
    return len(loader.sampler) if isinstance(loader.sampler, EvenSubset) else len(loader.dataset)


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as floats; what is none (a list of classes' figures, a matrix) as it is."""
    figures = {}
    for name, value in metrics.items():
        try:
            figures[name] = value if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError):
            figures[name] = value
    return figures


def _complete(results: Sequence[dict[str, Any]], coco: tuple[str, ...]) -> list[dict[str, Any]]:
    """The same names in every result.

    mmdet's COCO metrics (names that begin with one of ``coco``) give no figure at all where nothing is detected, as an
    attack may achieve: that is an AP of 0, or their -1 where there is no such object. Others' gaps become NaN.
    """
    names = {name: value for metrics in results for name, value in metrics.items()}
    absent = {
        name: min(value, 0.0) if name.startswith(coco) and isinstance(value, float) else math.nan
        for name, value in names.items()
    }
    return [{name: metrics.get(name, absent[name]) for name in names} for metrics in results]


def build_test_runner(cfg: Config, max_images: int | None = None, trust: bool = False) -> Runner:
    """The config's runner; with ``max_images`` its test takes that many images, spread evenly over the test set.

    A checkpoint that does not fill the network is an error there (:class:`~mmitp.engine.checkpoint.FitHook`); with
    ``trust`` it may be one that runs code.

    Metrics of the COCO kind, which go by the annotation file, are told which images those are.

    Raises:
        ValueError: as :class:`EvenSubset`, or for a metric with an annotation file of another kind.
    """
    if max_images is not None:
        cfg.test_dataloader.sampler = dict(type="mmitp.EvenSubset", images=max_images)
    cfg.resume = False
    runner = build_runner(cfg, trust)
    runner.register_hook(FitHook())
    if max_images is None:
        return runner
    loader = runner.test_loop.dataloader
    for metric in runner.test_loop.evaluator.metrics:
        if hasattr(metric, "img_ids"):
            metric.img_ids = [loader.dataset.get_data_info(i)["img_id"] for i in loader.sampler.indices]
        elif hasattr(metric, "ann_file") or hasattr(metric, "_coco_api"):
            raise ValueError(
                f"{type(metric).__name__} would count the objects of all images of its annotation file as missed: give "
                "the test set and the metric a smaller annotation file in place of max_images"
            )
    return runner
