"""Reads what :func:`mmitp.pruning.signs.check_signs` judges from the folder of a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine import Config

from mmitp.engine.config import config_of_run
from mmitp.engine.window import run_window
from mmitp.models.slim_config import prune_hook_of
from mmitp.pruning.signs import PruningRun, Sign, check_signs
from mmitp.values import is_number

__all__ = ["PruningRun", "Sign", "check_signs", "logged", "read_run"]


def read_run(work_dir: str | Path) -> PruningRun:
    """Reads config, scalars (those of resumed runs too) and ``pruning.json`` of a work folder.

    A log's last line that a kill has cut off is left out.

    Raises:
        ValueError: the folder holds no log, or none of a run with PruneHook; a file of it is damaged.
    """
    folder = Path(work_dir)
    logs = sorted(folder.glob("*/vis_data/scalars.json"))
    if not logs:
        raise ValueError(f"{folder} holds no */vis_data/scalars.json: give the --work-dir of a training run")
    cfg, _ = config_of_run(folder, logs)
    hook = prune_hook_of(cfg)
    lines: dict[int, dict[str, Any]] = {}
    for log in logs:
        for line in logged(log):
            if "L_HW" in line:
                _require_numbers(line, ("step", "epoch", "lr", "L_HW"), str(log))
                lines[line["step"]] = line
    if hook is None or not lines:
        raise ValueError(f"{folder} is no run with PruneHook that has logged L_HW")
    steps = sorted(lines)
    epoch_steps = _epoch_length([lines[s] for s in steps])
    if "max_iters" not in cfg.train_cfg and not epoch_steps > 0:
        raise ValueError(f"the logs of {folder} are damaged: their epochs do not rise with their steps")
    begin, end, length = run_window(hook, cfg.train_cfg, epoch_steps)
    decay = _at(cfg, "optim_wrapper", "optimizer", "weight_decay", default=0.0)
    decay_mult = _at(cfg, "optim_wrapper", "paramwise_cfg", "custom_keys", "prune_mask", "decay_mult", default=1.0)
    report = folder / "pruning.json"
    frozen = _record(report.read_text(encoding="utf-8", errors="replace"), str(report)) if report.is_file() else None
    if frozen is not None:
        _require_numbers(frozen, ("ratio", "ratio_before", "switched_off"), str(report))
        if "params_kept" in frozen:
            _require_numbers(frozen, ("params_kept", "macs_kept"), str(report))
            _require_numbers(frozen, ("params_dense", "macs_dense"), str(report), above=0)
    return PruningRun(
        name=folder.resolve().name,
        target=hook.target,
        b=hook.get("b", "auto"),
        begin=begin,
        end=end,
        init=_at(cfg, "model", "prune", "init", default=1.0),
        decay=decay * decay_mult,
        unit="iteration" if length == 1 else "epoch",
        times=[s / length for s in steps],
        hw_loss=[lines[s]["L_HW"] for s in steps],
        lr=[lines[s]["lr"] for s in steps],
        frozen=frozen,
    )


def _at(node: Any, *keys: str, default: float) -> Any:
    """A setting inside a config's dictionaries, any of which may be missing or None."""
    for key in keys:
        node = node.get(key) if isinstance(node, (Config, Mapping)) else None
    return default if node is None else node


def logged(log: Path) -> list[dict[str, Any]]:
    """The records of a ``scalars.json``; a last line that a kill has cut off is left out.

    Raises:
        ValueError: another one is damaged.
    """
    texts = [text for text in log.read_text(encoding="utf-8", errors="replace").split("\n") if text.strip()]
    if texts and not texts[-1].endswith("}"):
        texts.pop()
    return [_record(text, f"{log}, record {number}") for number, text in enumerate(texts, 1)]


def _record(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds a {type(record).__name__} where a record is expected")
    return record


def _require_numbers(record: dict[str, Any], keys: Sequence[str], where: str, above: float = -math.inf) -> None:
    for key in keys:
        value = record.get(key)
        if not is_number(value) or not above < value:  # type: ignore[operator]
            limit = "" if above == -math.inf else f" above {above:g}"
            shown = repr(value)
            shown = shown if len(shown) < 80 else f"{shown[:77]}..."
            raise ValueError(f"{where}: {key!r} must be a finite number{limit}, got {shown}")


def _epoch_length(lines: list[dict[str, Any]]) -> float:
    """Iterations an epoch: lines come after the same numbers of iterations in every epoch. 0 where there is none."""
    first: dict[int, int] = {}
    for line in lines:
        first.setdefault(line["epoch"], line["step"])
    a, b = min(first), max(first)
    return (first[b] - first[a]) / (b - a) if b > a else lines[-1]["step"] / b if b else 0.0
