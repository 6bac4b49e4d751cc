"""A trial of a training config: one optimizer step of every phase, on a few images, in a temporary folder."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmitp.engine.checkpoint import read_checkpoint
from mmitp.engine.hooks import AdversarialHook, CollapseGuardHook, DistillHook, PruneHook
from mmitp.engine.resume import settle_start
from mmitp.engine.run import build_runner
from mmitp.engine.window import RunLength
from mmitp.models.config_text import type_name
from mmitp.models.slim_config import hooks_of, is_type
from mmitp.registry import HOOKS
from mmitp.values import is_count, is_number

__all__ = ["dry_run", "shortened"]

_STEPS = 3  # before the window, in it, after it
_LENGTHS = {"epoch": "max_epochs", "iter": "max_iters"}
_WINDOWS = (AdversarialHook, CollapseGuardHook, DistillHook, PruneHook)  # a run may be too short for them
_RESUMED_AFTER = 1  # so that window, freeze and what comes after are gone through again


def dry_run(cfg: Config, trust: bool = False) -> str:
    """Builds all that a run needs and goes through its phases: before, in and after the pruning window, attacked,
    slimmed, validated, saved and resumed.

    The real work folder is not touched. Batches have their real size, so memory suffices for the real run if it does
    here (but for what data loaders in processes of their own take).

    Args:
        cfg: the run's config; left as it is.
        trust: also load checkpoints that may run code.

    Returns:
        What was done, a line each, and what the config has nothing of.

    Raises:
        ValueError: several processes were asked for; and whatever the run itself would raise.
    """
    if cfg.get("launcher", "none") != "none":
        raise ValueError("--dry-run goes through a run in one process: leave --launcher out")
    with tempfile.TemporaryDirectory(prefix="mmitp_dry_run_") as folder:
        whole, resumed = (Path(folder) / name for name in ("whole", "resumed"))
        seen = _Seen()
        start = copy.deepcopy(cfg)
        if cfg.get("resume"):  # what the run refuses to resume is refused here
            settle_start(start, trust)
        told: list[str] = []
        runner = _trained(shortened(start, str(whole)), trust, seen, lambda runner: told.extend(_fit(cfg, runner)))
        saved = sorted(path.name for path in whole.glob("step_*.pth"))
        again = shortened(start, str(resumed))
        again.load_from, again.resume = str(whole / f"step_{_first(again)}.pth"), True
        _trained(again, trust, _Seen())
        ends = [read_checkpoint(str(folder / saved[-1]), trust)["state_dict"] for folder in (whole, resumed)]
        lines = [*_report(cfg, runner, seen, saved, _difference(*ends)), *told]
        if start.get("resume"):
            lines.insert(1, f"the run itself goes on from {start.load_from}; these are the steps of a run that begins")
        return "\n".join(lines)


def shortened(cfg: Config, work_dir: str) -> Config:
    """A copy of a run's config with three optimizer steps, of which the pruning window is the second.

    It resumes nothing: it starts from ``load_from`` where that is of weights alone.

    Args:
        cfg: the run's.
        work_dir: the copy's.
    """
    cfg = copy.deepcopy(cfg)
    every = _accumulation(cfg)
    cfg.work_dir, cfg.log_level = work_dir, "WARNING"
    # mmengine keeps loggers and visualizers by this name: no other dry run of the process may have it.
    cfg.experiment_name = "_".join(Path(work_dir).parts[-2:])
    if cfg.get("resume"):
        cfg.load_from, cfg.resume = None, False
    loop = cfg.train_cfg
    by_epoch = "max_iters" not in loop
    unit = 1 if by_epoch else every  # an epoch is one step long
    lengths = {f"begin_{kind}": loop[key] for kind, key in _LENGTHS.items() if key in loop}
    for key in ("max_epochs", "max_iters", "val_begin", "val_interval", "dynamic_intervals"):
        loop.pop(key, None)
    loop.update({"max_epochs" if by_epoch else "max_iters": _STEPS * unit, "val_interval": _STEPS * unit})
    for part, batches in (("train_dataloader", every), ("val_dataloader", 1)):
        if loader := cfg.get(part):
            images = batches * int(loader.get("batch_size", 1))
            loader.sampler = dict(type="mmitp.FewSamples", images=images)
            loader.update(num_workers=0, persistent_workers=False)
            loader.pop("prefetch_factor", None)
    _shorten_attacks(cfg, unit, by_epoch)
    for hook in hooks_of(cfg):
        kind = type_name(hook.get("type"))
        if kind.endswith("PruneHook"):  # a push of fixed weight does not reach the target in one step
            hook.update(begin=unit, end=2 * unit, by_epoch=True, on_miss="project")
        elif kind.endswith("CollapseGuardHook"):
            hook.update(interval=unit, by_epoch=by_epoch)
        elif kind.endswith("DistillHook"):
            if is_count(hook.get("begin")):
                hook["begin"] = min(hook["begin"], unit)  # masks are open in the second step
        else:  # EMAHook's, which wants to begin before the run ends; an epoch and so many iterations are one step
            for key, step in (("begin_epoch", 1), ("begin_iter", every)):
                if is_count(hook.get(key)) and hook[key] <= lengths.get(key, hook[key]):
                    hook[key] = min(hook[key], step)
    defaults = cfg.setdefault("default_hooks", {})
    former = defaults.get("checkpoint")
    kept = ("type", "save_best", "rule", "greater_keys", "less_keys") if isinstance(former, Mapping) else ()
    defaults.checkpoint = dict(
        {key: former[key] for key in kept if key in former},
        interval=unit,
        by_epoch=by_epoch,
        filename_tmpl="step_{}.pth",
    )
    defaults.checkpoint.setdefault("type", "CheckpointHook")
    if isinstance(defaults.get("logger"), Mapping):
        defaults.logger.pop("out_dir", None)
    if isinstance(cfg.get("visualizer"), Mapping):
        cfg.visualizer.vis_backends = []
    return cfg


def _shorten_attacks(cfg: Config, unit: int, by_epoch: bool) -> None:
    """Attacks in the order of the run, each from a step of its own on; those at the same time stay so, to be refused.

    Args:
        cfg: a copy, whose hooks are changed.
        unit: epochs or iterations of an optimizer step.
        by_epoch: whether it is epochs.
    """
    hooks = [hook for hook in hooks_of(cfg) if is_type(hook, "AdversarialHook")]
    hooks = sorted((hook for hook in hooks if is_number(hook.get("begin", 0))), key=lambda hook: hook.get("begin", 0))
    if not hooks:
        return
    first = 1 if hooks[0].get("begin", 0) > 0 else 0
    stride = min(1.0, (_STEPS - first) / len(hooks))  # of more attacks than steps some may get no iteration
    begins = [int(place) if place == int(place) else place for place in (first + stride * i for i in range(len(hooks)))]
    ends: list[float | None] = []
    for one, two, begin in zip(hooks, hooks[1:], begins[1:], strict=False):
        alike = one.get("by_epoch", True) == two.get("by_epoch", True)
        apart = alike and is_number(one.get("end")) and one["end"] <= two.get("begin", 0)
        ends.append(begin * unit if apart else None)
    for hook, begin, end in zip(hooks, begins, [*ends, None], strict=True):
        hook.update(begin=begin * unit, end=end, warmup=0, by_epoch=by_epoch)


def _accumulation(cfg: Config) -> int:
    wrapper = cfg.get("optim_wrapper")
    return int(wrapper.get("accumulative_counts", 1)) if isinstance(wrapper, Mapping) else 1


def _first(cfg: Config) -> int:
    return _RESUMED_AFTER * cfg.default_hooks.checkpoint.interval


class _Seen(Hook):
    """What happened, a line each."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.validated: dict[str, float] | None = None

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        what = [f"loss {outputs['loss'].item():.4g}"] if outputs and "loss" in outputs else []
        for hook in runner.hooks:
            if isinstance(hook, PruneHook):
                now = runner.iter if hook.by_iter else runner.epoch
                if now >= hook.end:
                    done = " and slimmed" if hook.slimmed is not None else ""
                    what.append(f"after the pruning window, masks {'frozen' if hook.frozen else 'open'}{done}")
                else:
                    what.append(f"{'before' if now < hook.begin else 'in'} the pruning window")
            elif isinstance(hook, AdversarialHook):
                what.append(f"attacked by {hook.eps * hook.scale:g} pixels/255" if hook.scale else "not attacked")
        self.lines.append(f"iteration {runner.iter + 1}: {', '.join(what)}")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.validated = metrics


class _CatchUp(Hook):
    """Loads the batches of the epochs before a resume: a data set may keep their images, as mmdet's CachedMosaic."""

    def before_train(self, runner: Runner) -> None:
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            for epoch in range(runner.epoch):
                runner.message_hub.update_info("epoch", epoch)  # FastCIFAR10 draws by it
                for _ in runner.train_loop.dataloader:
                    pass


def _trained(cfg: Config, trust: bool, seen: _Seen, first: Callable[[Runner], object] | None = None) -> Runner:
    runner = build_runner(cfg, trust)
    runner.register_hook(_CatchUp())
    runner.register_hook(seen)
    if first is not None:
        first(runner)
    runner.train()
    return runner


def _fit(cfg: Config, trial: Runner) -> list[str]:
    """Asks the hooks of the run itself whether their windows fit it, which those of the trial always do.

    Args:
        cfg: the run's.
        trial: the shortened run, of which the data set is taken.

    Returns:
        What the run will warn of.

    Raises:
        ValueError: a window does not fit.
    """
    loop, loader = cfg.train_cfg, cfg.train_dataloader
    by_epoch = "max_iters" not in loop
    if not is_count(length := loop.get("max_epochs" if by_epoch else "max_iters")):
        raise ValueError(f"train_cfg says no length of the run in max_epochs or max_iters, got {dict(loop)}")
    epoch = 1
    if by_epoch:
        dataset = trial.train_loop.dataloader.dataset
        sampler = DATA_SAMPLERS.build(copy.deepcopy(loader.sampler), default_args=dict(dataset=dataset, seed=0))
        batches = len(sampler) / loader.get("batch_size", 1)
        epoch = int(batches) if loader.get("drop_last") else math.ceil(batches)
    run = RunLength(by_epoch, length, length * epoch)
    ours = [hook for hook in hooks_of(cfg) if any(is_type(hook, kind.__name__) for kind in _WINDOWS)]
    built = [hook for hook in map(HOOKS.build, copy.deepcopy(ours)) if isinstance(hook, _WINDOWS)]
    return [f"the run will warn: {told}" for hook in built for told in hook.check_length(run)]


def _difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> float:
    """Greatest difference of two networks' weights, infinite where they have other keys or shapes."""
    if one.keys() != two.keys() or any(one[key].shape != two[key].shape for key in one):
        return float("inf")
    pairs = [(one[key], two[key]) for key in one if not torch.equal(one[key], two[key])]
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)


def _report(cfg: Config, runner: Runner, seen: _Seen, saved: list[str], difference: float) -> list[str]:
    prune = next((hook for hook in runner.hooks if isinstance(hook, PruneHook)), None)
    lines = [f"dry run of {cfg.filename or 'the config'}: {_STEPS} optimizer steps in a temporary folder", *seen.lines]
    if seen.validated is not None:
        found = ", ".join(seen.validated) or f"no figure, which is usual for a detector after {_STEPS} steps"
        lines.append(f"validated on {cfg.val_dataloader.get('batch_size', 1)} images or fewer: {found}")
    lines.append(f"saved {', '.join(saved)}")
    if difference == float("inf"):
        raise RuntimeError("a run resumed from the first step's checkpoint ends with another network's layout")
    lines.append(
        f"resumed from the checkpoint of step {_RESUMED_AFTER}: "
        + ("the same network to the last bit" if not difference else f"the network differs by at most {difference:.2g}")
    )
    missing = []
    if prune is None:
        missing.append("pruned (no PruneHook)")
    elif not prune.slim_at_end:
        missing.append("slimmed (slim_at_end is off)")
    if not any(isinstance(hook, AdversarialHook) for hook in runner.hooks):
        missing.append("attacked (no AdversarialHook)")
    if seen.validated is None:
        missing.append("validated (no val_dataloader)")
    return [*lines, f"not asked for, so not tried: {', '.join(missing)}"] if missing else lines
