"""A config's own test, clean and under attack: same data, same metric, another image in front of the network."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mmengine import Config
from mmengine.dist import all_gather_object
from mmengine.runner import Runner

from mmitp.datasets import EvenSubset
from mmitp.engine.attack import class_labels, is_multi_label, unwrap
from mmitp.engine.checkpoint import FitHook
from mmitp.engine.robust_eval.attacker import attacked
from mmitp.engine.robust_eval.classification import FOR_CLASSIFIERS, NOT_FOR_CLASSIFIERS, NOT_FOR_MULTI_LABEL
from mmitp.engine.robust_eval.report import RobustReport
from mmitp.engine.robust_eval.settings import EvalAttack
from mmitp.engine.run import build_runner


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
    """Whether the attack is for the model and for what the test set's samples carry: the first one is asked."""
    if is_multi_label(runner.model):
        raise ValueError(NOT_FOR_MULTI_LABEL.format(type(unwrap(runner.model).head).__name__))
    if attack.name != "autoattack" and attack.objective == "truth":
        return
    if attack.name == "autoattack" and find_spec("pyautoattack") is None:
        raise ValueError('AutoAttack needs its authors\' package: pip install -e ".[autoattack]"')
    dataset = runner.test_loop.dataloader.dataset
    if not len(dataset):
        return
    item = dataset[0]
    samples = [item["data_samples"]] if isinstance(item, dict) and "data_samples" in item else None
    classified = class_labels(samples, runner.model) is not None
    if classified and attack.objective != "truth":
        raise ValueError(NOT_FOR_CLASSIFIERS.format(attack.objective))
    if not classified and attack.name == "autoattack":
        raise ValueError(FOR_CLASSIFIERS)


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
