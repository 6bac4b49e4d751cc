"""Which checkpoint a run resumes from: the newest that is whole, and the reasons against those that are newer."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine import Config
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import Runner

from mmitp.engine.checkpoint import read_checkpoint
from mmitp.engine.hooks.prune_hook import STATE_KEY
from mmitp.engine.saving import GRADIENTS
from mmitp.models.slim_config import prune_hook_of

__all__ = ["AUTO", "ScheduleCheck", "last_checkpoint", "newest_good", "read_training_state", "settle_start"]

#: ``resume`` of a config that goes on from the newest good checkpoint, and from ``load_from`` where there is none
AUTO = "auto"


def settle_start(cfg: Config, trust: bool = False) -> None:
    """Makes sure, before data sets are built, that a run can start from where its config says, and from where that is.

    With ``resume`` and no ``load_from``, the latter becomes :func:`newest_good`; if there is none, ``resume`` is taken
    back. With ``resume=AUTO`` this is so whatever ``load_from`` says, which stays, for its weights alone, if there is
    none: a job that always asks to resume begins with the weights that its config names. A config without
    ``randomness.seed`` gets the checkpoint's: mmengine restores it after it has built the data sets and samplers, which
    would go on with other draws.

    Args:
        cfg: the run's; ``load_from`` and ``resume`` are set.
        trust: also take checkpoints that may run code.

    Raises:
        ValueError: the checkpoint cannot be read, or cannot be resumed.
    """
    state = None
    if cfg.get("resume") == AUTO or cfg.get("resume") and not cfg.get("load_from"):
        newest, state = _newest(cfg, trust)
        cfg.load_from, cfg.resume = newest or cfg.get("load_from"), newest is not None
    if state is None and cfg.get("load_from") and "://" not in cfg.load_from:  # elsewhere: fetched when it is needed
        if cfg.get("resume"):
            state = read_training_state(cfg.load_from, cfg, trust)
        else:
            read_checkpoint(cfg.load_from, trust)
    randomness = cfg.get("randomness") or {}
    if state is not None and randomness.get("seed") is None and isinstance(seed := state["meta"].get("seed"), int):
        cfg.randomness = dict(randomness, seed=seed)


def newest_good(cfg: Config, trust: bool = False) -> str | None:
    """The checkpoint that ``--resume`` goes on from; what is skipped, and why, goes to the log.

    ``last_checkpoint`` is a hint: it may be missing, empty or point to a place from which the folder was moved.

    Args:
        cfg: the run's, with ``work_dir``.
        trust: as in :func:`read_checkpoint`.

    Returns:
        Its path; ``None`` where there are no checkpoints at all and the run starts from the beginning.

    Raises:
        ValueError: there are some, but none is good: a run from the beginning would overwrite them.
    """
    return _newest(cfg, trust)[0]


def _newest(cfg: Config, trust: bool) -> tuple[str | None, dict[str, Any] | None]:
    """:func:`newest_good`, and what it holds."""
    skipped = []
    for path in _candidates(cfg):
        try:
            state = read_training_state(str(path), cfg, trust)
        except ValueError as error:
            skipped.append(str(error))
            continue
        for reason in skipped:
            print_log(f"--resume passes over {reason}", logger="current", level=30)
        return str(path), state
    if skipped:
        raise ValueError(
            f"--resume: none of the {len(skipped)} checkpoints in {cfg.work_dir} can be resumed, and a run from the "
            f"beginning would overwrite them (move them away, or take another --work-dir): {'; '.join(skipped)}"
        )
    weights = f", with the weights of {cfg.load_from} (load_from)" if cfg.get("load_from") else ""
    print_log(
        f"--resume: no checkpoints in {cfg.work_dir}, the run starts from the beginning{weights}", logger="current"
    )
    return None, None


def read_training_state(path: str, cfg: Config, trust: bool = False) -> dict[str, Any]:
    """Reads a checkpoint that a run can go on from.

    Raises:
        ValueError: as :func:`read_checkpoint`; or it holds weights only, or not the state of the pruning, or not the
            gradients that wait for the optimizer's next step.
    """
    loaded = read_checkpoint(path, trust)
    if missing := [key for key in ("state_dict", "meta", "message_hub", *_wanted(cfg)) if key not in loaded]:
        off = [name for name in ("save_optimizer", "save_param_scheduler") if _setting(cfg, name) is False]
        why = (
            f"; the config has {', '.join(f'{name}=False' for name in off)} in default_hooks.checkpoint" if off else ""
        )
        raise ValueError(
            f"{path}: it cannot be resumed, it lacks {', '.join(missing)} (load_from takes weights alone{why})"
        )
    meta, hub = loaded["meta"], loaded["message_hub"]
    for key in ("epoch", "iter"):
        if not isinstance(meta.get(key), int) or meta[key] < 0:
            raise ValueError(f"{path}: meta.{key} must be a whole number, got {meta.get(key)!r}")
    for key in ("log_scalars", "runtime_info", "resumed_keys"):
        if not isinstance(hub, Mapping) or not isinstance(hub.get(key), Mapping):
            raise ValueError(f"{path}: message_hub.{key} is no dictionary")
    # mmengine reads these in the midst of the run
    if strange := [key for key, value in hub["log_scalars"].items() if not isinstance(value, HistoryBuffer)]:
        raise ValueError(f"{path}: message_hub.log_scalars[{strange[0]!r}] is no logged history")
    if strange := [key for key, value in hub["resumed_keys"].items() if not isinstance(value, bool)]:
        raise ValueError(f"{path}: message_hub.resumed_keys[{strange[0]!r}] must be True or False")
    optim = cfg.get("optim_wrapper") or {}
    every = optim.get("accumulative_counts", 1) if isinstance(optim, Mapping) else 1
    finished = meta["iter"] == hub["runtime_info"].get("max_iters")
    if GRADIENTS in loaded:
        if not isinstance(loaded[GRADIENTS], Mapping):
            raise ValueError(
                f"{path}: it was saved between two optimizer steps of several processes, and the gradients that each "
                f"of them had accumulated are lost. Save where accumulative_counts={every} divides the iterations done"
            )
    elif meta["iter"] % every and not finished:
        raise ValueError(
            f"{path}: it was saved after iteration {meta['iter']}, between two optimizer steps "
            f"(accumulative_counts={every}), without the gradients accumulated by then: going on would train another "
            "network"
        )
    return loaded


def _wanted(cfg: Config) -> list[str]:
    """Keys of a checkpoint without which this config's run would not go on as it was."""
    keys = ["optimizer", "param_schedulers"] if cfg.get("param_scheduler") else ["optimizer"]
    if prune_hook_of(cfg) is not None:
        keys.append(STATE_KEY)
    return keys


def _setting(cfg: Config, key: str) -> Any:
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    return hook.get(key) if isinstance(hook, Mapping) else None


class ScheduleCheck(Hook):
    """Tells where a resumed run's schedules are not those of its config: mmengine restores the checkpoint's whole."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compares them; weights alone bring none."""
        ours, saved = runner.param_schedulers, checkpoint.get("param_schedulers")
        if getattr(runner, "_resume", False) and isinstance(ours, list) and isinstance(saved, list):
            for told in _changed_schedules(ours, saved):
                runner.logger.warning(
                    f"the checkpoint's schedule goes on, whatever the config says now: {told}. For another one start a "
                    "new run from the weights (load_from instead of resume)"
                )


def _changed_schedules(ours: Sequence[Any], saved: Sequence[Any]) -> Iterator[str]:
    if len(ours) != len(saved):
        yield f"the checkpoint has {len(saved)} param_schedulers, the config {len(ours)}"
    for schedule, state in zip(ours, saved, strict=False):
        if isinstance(schedule, Mapping):  # not built yet
            continue
        now, settings = vars(schedule), {"base_values"}
        for kind in type(schedule).__mro__:
            settings.update(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
        for key in sorted(settings - {"last_step", "verbose", "optimizer"}):
            if isinstance(state, Mapping) and key in state and key in now and state[key] != now[key]:
                then = f"{_short(state[key])} in the checkpoint, {_short(now[key])} in the config"
                yield f"{type(schedule).__name__}.{key} is {then}"


def _short(value: Any) -> str:
    """Of the parameter groups' values, which may be many, the first."""
    return f"{value[0]!r} (and others)" if isinstance(value, list) and len(value) > 1 else f"{value!r}"


def _candidates(cfg: Config) -> Iterator[Path]:
    """The work folder's checkpoints, the most promising first.

    That is what ``last_checkpoint`` names, unless others are newer both by number and by date. Without it the date
    decides, and among equals the number: a folder may hold those of an earlier run, which count further.
    """
    work_dir = Path(cfg.work_dir)
    folders = [work_dir]
    out_dir = _setting(cfg, "out_dir")
    if out_dir and "://" not in str(out_dir):
        folders.append(Path(out_dir) / work_dir.absolute().name)
    found: dict[Path, tuple[int, int]] = {}
    patterns = [re.compile(pattern) for pattern in _patterns(cfg)]
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if match := next((m for p in patterns if (m := p.fullmatch(path.name))), None):
                found[path] = (path.stat().st_mtime_ns, int(match[1]))
    named = last_checkpoint(work_dir, folders)
    if named is not None:
        date, number = found.pop(named, (named.stat().st_mtime_ns, -1))
        newer = [path for path, order in found.items() if order[0] > date and order[1] > number >= 0]
        yield from sorted(newer, key=lambda path: found[path], reverse=True)
        yield named
        found = {path: order for path, order in found.items() if path not in newer}
    yield from sorted(found, key=lambda path: found[path], reverse=True)


def _patterns(cfg: Config) -> Iterator[str]:
    for template in {"epoch_{}.pth", "iter_{}.pth", _setting(cfg, "filename_tmpl")} - {None}:
        before, _, after = re.sub(r"\{[^}]*\}", "{}", str(template), count=1).partition("{}")
        yield f"{re.escape(before)}([0-9]+){re.escape(after)}"


def last_checkpoint(work_dir: Path, folders: Sequence[Path]) -> Path | None:
    """The file that ``last_checkpoint`` names, wherever the folder has been moved to; None where it names none."""
    pointer = work_dir / "last_checkpoint"
    if not pointer.is_file():
        return None
    text = pointer.read_bytes()[:4096].decode("utf-8", "replace").strip()
    if not text or not text.isprintable():
        return None
    for folder in folders:
        if os.path.exists(beside := folder / os.path.basename(text)) and beside.name:  # False for a name too long
            return beside
    return Path(text) if os.path.isfile(text) else None
