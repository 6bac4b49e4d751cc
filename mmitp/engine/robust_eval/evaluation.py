"""A config's own test, clean and under attack: same data, same metric, another image in front of the network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from mmengine import Config
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmitp.datasets import EvenSubset
from mmitp.engine.attack import class_labels, is_multi_label, unwrap
from mmitp.engine.checkpoint import FitHook
from mmitp.engine.robust_eval.attacker import AttackLog, attacked
from mmitp.engine.robust_eval.classification import FOR_CLASSIFIERS, NOT_FOR_CLASSIFIERS, NOT_FOR_MULTI_LABEL
from mmitp.engine.robust_eval.report import RobustReport
from mmitp.engine.robust_eval.settings import EvalAttack
from mmitp.engine.run import build_runner
from mmitp.pruning.rng import kept_rng
from mmitp.pruning.verify import eval_mode


def evaluate(
    runner: Runner,
    attack: EvalAttack,
    eps: Sequence[float],
    rescue: Callable[[RobustReport], object] | None = None,
) -> RobustReport:
    """The runner's own test, clean and then under the attack at each size.

    Args:
        runner: with a test loop; weights are loaded as ``runner.test()`` does.
        attack: the attack.
        eps: sizes in pixels/255, at least one, none twice.
        rescue: called with what is measured so far (by this process) where a later size fails, before the error goes
            on.

    Raises:
        ValueError: before anything is tested for sizes that make no sweep, an attack that is not for these data, or one
            that the first images show not to fit the model; for metrics that are no numbers; or as :func:`attacked`.
    """
    for doubt in attack.check(eps):
        runner.logger.warning(doubt)
    _check_kind(runner, attack)
    loader = runner.test_loop.dataloader
    rehearsal = _Rehearsal(attack)
    runner.register_hook(rehearsal)
    start = time.perf_counter()
    try:
        results = [_figures(runner.test())]
    finally:
        runner.hooks.remove(rehearsal)
    seconds = [time.perf_counter() - start]
    logs: list[AttackLog] = []

    def report(gathered: Sequence[Sequence[AttackLog]]) -> RobustReport:
        flags = [flag for part in gathered for log in part for flag in log.flags]
        coco = tuple(f"{metric.prefix}/" for metric in runner.test_loop.evaluator.metrics if hasattr(metric, "img_ids"))
        clean, *under_attack = _complete(results, coco)
        return RobustReport(
            attack=attack,
            eps=[float(size) for size in eps[: len(under_attack)]],
            clean=clean,
            attacked=under_attack,
            images=tested_images(loader),
            total=len(loader.dataset),
            seconds=seconds,
            largest=[max(part[i].largest for part in gathered) for i in range(len(under_attack))],
            flags=list(dict.fromkeys(flags)),
        )

    for size in eps:
        start = time.perf_counter()
        try:
            # Not runner.test(): before_run would run again, and averaged weights (EMA) be taken anew.
            with attacked(runner.model, attack, size, loader.dataset) as log:
                results.append(_figures(runner.test_loop.run()))
        except BaseException:
            if rescue is not None and logs:
                rescue(report([logs]))  # nothing is gathered: the other processes may be gone
            raise
        seconds.append(time.perf_counter() - start)
        logs.append(log)
    return report(all_gather_object(logs))


class _Rehearsal(Hook):
    """Attacks a first batch at size 0 with the weights that are tested, before the clean test takes its time."""

    priority = "LOWEST"

    def __init__(self, attack: EvalAttack) -> None:
        steps = dict(steps=1, restarts=1) if attack.name == "pgd" else {}
        self.attack = replace(attack, **steps)  # type: ignore[arg-type]

    def before_test(self, runner: Runner) -> None:
        loader, model = runner.test_loop.dataloader, unwrap(runner.model)
        dataset = loader.dataset
        indices = range(min(len(dataset), loader.batch_size or 1))
        if not indices:
            return
        with kept_rng(0), eval_mode(model), attacked(model, self.attack, 0.0, dataset), torch.no_grad():
            whole = getattr(dataset, "__getitems__", None)
            items = whole(list(indices)) if whole is not None else [dataset[index] for index in indices]
            model.data_preprocessor(loader.collate_fn(items), False)


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
