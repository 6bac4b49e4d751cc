"""Configs from files, from the OpenMMLab packages, and from the command line."""

from __future__ import annotations

import argparse
import copy
import difflib
import inspect
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine import Config
from mmengine.config import DictAction
from mmengine.hub import get_config
from mmengine.logging import print_log
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TASK_UTILS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    init_default_scope,
)
from mmengine.runner import Runner
from torch import nn

from mmitp.values import is_count

# Keys of a config's first level that stand in none: what Runner.from_cfg reads, and what any config may have.
_TOP = {*inspect.signature(Runner.__init__).parameters, "runner_type", "compile"} - {"self", "cfg"}
_LOADER = {"batch_size": 1, "num_workers": 0}
# What counts images, processes, epochs or iterations, and the least that makes sense.
_COUNTS = {f"{part}_dataloader.{key}": least for part in ("train", "val", "test") for key, least in _LOADER.items()}
_COUNTS |= {f"train_cfg.{key}": 1 for key in ("max_epochs", "max_iters", "val_interval")}
_COUNTS |= {"optim_wrapper.accumulative_counts": 1, "default_hooks.logger.interval": 1}
# Where the classes are that a training config names.
_REGISTRIES = (
    HOOKS, OPTIMIZERS, OPTIM_WRAPPERS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS, DATASETS, DATA_SAMPLERS,
    TRANSFORMS, METRICS, LOOPS, VISUALIZERS, VISBACKENDS, MODELS, TASK_UTILS,
)  # fmt: skip


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as mmengine's ``DictAction`` reads them, the last of a key's values.

    Raises:
        ValueError: one has another form, or its brackets do not close.
    """
    for text in texts:
        key, sep, _ = text.partition("=")
        if not sep or not all(key.split(".")) or not key.isprintable():
            raise ValueError(f"--cfg-options takes key=value, got {text!r}")
    parsed = argparse.Namespace(options={})
    try:
        DictAction(["--cfg-options"], "options")(argparse.ArgumentParser(), parsed, texts)
    except (AssertionError, RecursionError) as error:  # brackets, dicts
        raise ValueError(
            f"--cfg-options {' '.join(map(_in_line, texts))} cannot be read: {error} "
            "(dicts are set key by key, or in a file)"
        ) from error
    return parsed.options


def load_config(source: str, options: Mapping[str, Any] | Sequence[str] = (), work_dir: str | None = None) -> Config:
    """Reads a config.

    Args:
        source: path of a file, or ``'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'`` and the like.
        options: overrides, ``{'a.b': value}`` or ``['a.b=value']``. A key that the config lacks is added if its
            class or the Runner takes it (or its class cannot be told, and no key of the config looks like it).
        work_dir: overrides the config's; by default ``work_dirs/<config name>``.

    Raises:
        ValueError: there is no such config or it cannot be read; an option is not of the form ``key=value``, or has a
            key that nothing takes (the nearest existing one is named); a value is NaN, or no whole number where one is
            wanted (batch sizes, lengths of the run).
    """
    if "::" in source:
        cfg = _packaged(*source.split("::", 1))
    elif os.path.isfile(source):
        cfg = read_config(source)
    else:
        raise ValueError(f"no config file {source!r} (a packaged one is named like 'mmdet::folder/name.py')")
    for key, value in (options if isinstance(options, Mapping) else read_options(options)).items():
        _check_key(cfg, key)
        try:
            cfg.merge_from_dict({key: value})
        except (AssertionError, AttributeError, KeyError, RecursionError, TypeError) as error:  # dicts
            raise ValueError(
                f"--cfg-options {key}={_in_line(value)} does not fit the config: {error} "
                "(dicts are set key by key, or in a file)"
            ) from error
    if not isinstance(hooks := cfg.get("custom_hooks") or [], (list, tuple)):
        raise ValueError(
            f"custom_hooks must be a list of hooks, got {_in_line(hooks)}: where {source} has none, --cfg-options "
            "cannot set one by its number; write custom_hooks = [dict(type=...)] into a file"
        )
    name = os.path.splitext(os.path.basename(source.split("::")[-1]))[0]
    cfg.work_dir = work_dir or cfg.get("work_dir") or os.path.join("work_dirs", name)
    _check_values(cfg, source)
    return cfg


def read_config(path: str | os.PathLike[str]) -> Config:
    """A config from a file, as it stands there.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Config.fromfile(str(path))
    except (Exception, SystemExit) as error:  # the file is a program: anything may go wrong in it
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} cannot be read as a config: {text}") from error


def config_of_run(folder: Path, logs: Sequence[Path]) -> tuple[Config, list[str]]:
    """The newest config that a run left beside its logs and that can be read.

    Args:
        folder: the work folder.
        logs: its ``*/vis_data/scalars.json``, the oldest first.

    Returns:
        The config, and why newer ones cannot be read.

    Raises:
        ValueError: none can be read.
    """
    configs = [path for log in reversed(logs) if (path := log.with_name("config.py")).is_file()]
    if not configs:
        raise ValueError(f"{folder} holds logs but no */vis_data/config.py, which says what was trained")
    unread: list[str] = []
    for path in configs:
        try:
            return _read_dumped(path), unread
        except ValueError as error:
            unread.append(str(error))
    raise ValueError(f"no config says what was trained in {folder}: {'; '.join(unread)}")


def _read_dumped(path: Path) -> Config:
    """A config as mmengine leaves it in a work folder, which writes infinities and NaN as names that nobody defines.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return read_config(path)
    except ValueError:
        text = path.read_text(encoding="utf-8", errors="replace")
        if re.search(r"\b(inf|nan)\b", text) is None:
            raise
        with tempfile.TemporaryDirectory(prefix="mmitp_config_") as folder:
            copied = Path(folder) / path.name
            copied.write_text(f"inf, nan = float('inf'), float('nan')\n{text}", encoding="utf-8")
            try:
                cfg = read_config(copied)
            except ValueError as error:
                raise ValueError(str(error).replace(str(copied), str(path))) from error
    for name in ("inf", "nan"):
        cfg._cfg_dict.pop(name)
    object.__setattr__(cfg, "_filename", str(path))  # Config's own would make a key of it
    return cfg


def scale_learning_rate(cfg: Config) -> None:
    """Turns a config's ``auto_scale_lr`` on: its learning rate is for ``base_batch_size`` images a step.

    mmengine scales the config's own optimizer by the real batch size over that. PruneHook's ``lr``, which trains the
    masks by the budget's push, stays: it counts steps, not images.

    Raises:
        ValueError: the config does not say for how many images its learning rate is.
    """
    if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
        raise ValueError(
            "--auto-scale-lr: the config does not say for how many images its learning rate is; set "
            "auto_scale_lr = dict(base_batch_size=...), or leave the option out"
        )
    cfg.auto_scale_lr.enable = True


def draw_predictions(cfg: Config, folder: str) -> None:
    """Has a test draw every image with its predictions into a folder, by mmdet's or mmpretrain's visualization hook.

    Raises:
        ValueError: the config is of neither package.
    """
    folder = os.path.abspath(folder)
    settings = {
        "mmdet": dict(type="mmdet.DetVisualizationHook", draw=True, test_out_dir=folder),
        "mmpretrain": dict(type="mmpretrain.VisualizationHook", enable=True, interval=1, out_dir=folder),
    }.get(cfg.get("default_scope") or "")
    if settings is None:
        raise ValueError(
            f"--show-dir draws for configs of mmdet and mmpretrain, and this one's default_scope is "
            f"{cfg.get('default_scope')!r}"
        )
    hooks = cfg.setdefault("default_hooks", {})
    hooks["visualization"] = {**(hooks.get("visualization") or {}), **settings}


def _check_values(cfg: Config, source: str) -> None:
    """Refuses values that a run would meet in its midst, or not at all.

    Raises:
        ValueError: with the key.
    """
    for key, value in _leaves(cfg.to_dict()):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{source}: {key} is NaN")
    for key, least in _COUNTS.items():
        node: Any = cfg._cfg_dict
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None and not is_count(node, least):
            raise ValueError(f"{source}: {key} must be a whole number of at least {least}, got {node!r}")


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, (Mapping, list, tuple)):
        for part, child in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _leaves(child, f"{key}.{part}" if key else str(part))
    else:
        yield key, node


def require_keys(cfg: Config, keys: Sequence[str], purpose: str) -> None:
    """Looks for what a tool reads of a config.

    Args:
        cfg: as :func:`load_config` gives it.
        keys: of its first level.
        purpose: what they are for, "to train on".

    Raises:
        ValueError: one of them is missing or empty.
    """
    if missing := [key for key in keys if not cfg.get(key)]:
        raise ValueError(
            f"{cfg.filename or 'the config'} has no {' and no '.join(missing)}: there is nothing {purpose}"
        )


def enter_scope(cfg: Config) -> None:
    """Makes a config's ``default_scope`` the present one, as the Runner does.

    None, as in the newer style's configs, leaves every package to its own registry.
    """
    if (scope := cfg.get("default_scope", "mmengine")) is not None:
        init_default_scope(scope)


def build_model(cfg: Config) -> nn.Module:
    """Builds a config's model as the Runner does: in the config's scope, with its data preprocessor.

    The config stays as it is, whatever a model's code does to its arguments: DETR's heads write tensors into theirs.
    """
    enter_scope(cfg)
    model = copy.deepcopy(cfg.model)
    if cfg.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", copy.deepcopy(cfg.data_preprocessor))
    return MODELS.build(model)


def _packaged(package: str, name: str) -> Config:
    try:
        return get_config(f"{package}::{name if name.endswith('.py') else name + '.py'}", pretrained=False)
    except FileNotFoundError as error:
        raise ValueError(f"{package} has no config {name!r}") from error
    except Exception as error:  # no such package, or the config's own
        raise ValueError(f"{package}::{name} cannot be read: {type(error).__name__}: {error}") from error


def _in_line(value: Any) -> str:
    """As it reads; escaped where that would break the line."""
    return text if (text := str(value)).isprintable() else repr(value)


def _check_key(cfg: Config, key: str) -> None:
    """Refuses the key of an override that nothing would read.

    Raises:
        ValueError: with the nearest key that exists.
    """
    node: Any = cfg._cfg_dict
    parts = key.split(".")
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        if isinstance(node, (list, tuple)):
            if not part.isdecimal() or int(part) >= len(node):
                raise ValueError(
                    f"--cfg-options {key}: {here} is a list of {len(node)} without an entry {part!r} (counted from 0)"
                )
            node = node[int(part)]
            continue
        if not isinstance(node, Mapping):
            raise ValueError(f"--cfg-options {key}: {here} is {node!r}, which has no {part!r}")
        if part not in node:
            _check_new(cfg, node, part, key, here)
            return
        node = node[part]


def _check_new(cfg: Config, node: Mapping[str, Any], part: str, key: str, here: str) -> None:
    """Refuses a key that is new to a part of the config, unless what reads that part takes it or may take it."""
    if here:
        known, open_ended = _accepted(node.get("type"), cfg.get("default_scope") or "mmengine")
    else:
        known, open_ended = _TOP, False
    if part in known:
        return
    near = difflib.get_close_matches(part, {*map(str, node), *known}, 1, 0.8 if open_ended else 0.0)
    if near:
        where = f"{here} ({_name(node['type'])})" if here and "type" in node else here or "the config"
        raise ValueError(f"--cfg-options {key}: {where} has no {part!r}; the nearest is {near[0]!r}")
    print_log(f"--cfg-options {key}: new to the config", logger="current", level=logging.WARNING)


def _accepted(kind: Any, scope: str) -> tuple[set[str], bool]:
    """The keyword arguments of what a config's ``type`` names, and whether there may be more."""
    try:
        parameters = inspect.signature(kind if callable(kind) else _find(kind, scope)).parameters.values()
    except (TypeError, ValueError):  # not found, or a built-in that does not say
        return set(), True
    return {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _find(name: Any, scope: str) -> Any:
    """What a ``type`` names, in whichever registry has it."""
    for root in _REGISTRIES if isinstance(name, str) else ():
        with root.switch_scope_and_registry(scope) as registry:
            if (found := registry.get(name)) is not None:
                return found
    return None


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
