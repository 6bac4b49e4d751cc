"""What a training leaves in its work folder: scalars, config, the freeze's record, slimmed networks, results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine import Config, ConfigDict

from mmitp.engine.config import config_of_run, read_config
from mmitp.engine.resume import last_checkpoint
from mmitp.engine.run_record import RECORD
from mmitp.engine.window import run_window
from mmitp.models.slim_config import is_masked, is_type, prune_hook_of
from mmitp.values import is_count, is_number, unlike

__all__ = ["Result", "RunRecord", "headline", "read_run"]

#: phases of a run with PruneHook, and of one without
PHASES = ("before the window", "in the window", "after the freeze")

_LAYER = dict(name="", macs_dense=0, macs_kept=0, in_channels=0, in_kept=0, out_channels=0, out_kept=0)
#: What the report reads of ``pruning.json``, of a training's or a test's record (the second parts may be missing), and
#: of a test under attack.
_FROZEN = (
    dict(ratio=0.0, ratio_before=0.0, layers=[_LAYER]),
    dict(macs_dense=0, macs_kept=0, params_dense=0, params_kept=0),
)
_RECORD: tuple[dict[str, Any], dict[str, Any]] = (
    {},
    dict(command=[""], device="", versions={}, processor_seconds=0.0, config="", images=0, slimmed=False),
)
_ATTACKED: dict[str, Any] = dict(clean={}, attacked=[{}], eps=[0.0], attack={})


@dataclass
class Result:
    """One test of a network of the run.

    Attributes:
        network: ``'dense'``, ``'masked'`` or ``'slimmed'``.
        test: ``'clean'`` or the attack with its size.
        metrics: name -> figure, numbers only.
        file: where it was read.
        run: what it was measured with (:func:`mmitp.engine.results.provenance`).
    """

    network: str
    test: str
    metrics: dict[str, float]
    file: Path
    run: dict[str, Any]


@dataclass
class RunRecord:
    """What is known of a run.

    Attributes:
        folder: its work folder.
        name: the folder's name.
        cfg: the newest config.
        train: logged lines of the training by step, those of resumed runs in place of what they repeat.
        validations: ``(step, metrics)`` of every validation; the step is the log's.
        hook: PruneHook's settings, or None.
        frozen: ``pruning.json``, or None before the freeze and in a dense run.
        slim_config: config of the slimmed network, or None.
        slim_weights: its weights, or None.
        checkpoint: the newest checkpoint, or None.
        results: tests, see :class:`Result`.
        records: a dict a start of the training: command, versions, seconds.
        remarks: what was left out and why.
    """

    folder: Path
    name: str
    cfg: Config
    train: list[dict[str, Any]] = field(default_factory=list)
    validations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    hook: ConfigDict | None = None
    frozen: dict[str, Any] | None = None
    slim_config: Path | None = None
    slim_weights: Path | None = None
    checkpoint: Path | None = None
    results: list[Result] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def pruned(self) -> bool:
        return self.hook is not None

    @property
    def small(self) -> bool:
        """Whether it trains what is small from the start: a control, or a slimmed network by its own config."""
        return is_type(self.cfg.get("model", {}), "SlimModel")

    @property
    def by_epoch(self) -> bool:
        return bool(self._loop.get("by_epoch", True)) and "max_epochs" in self._loop

    @property
    def _loop(self) -> dict[str, Any]:
        return self.cfg.get("train_cfg") or {}  # none in a config to test with

    def steps_an_epoch(self) -> float | None:
        """Steps an epoch by the log; None with an iteration-based loop, and where one epoch is all that is logged."""
        if not self.by_epoch:
            return None
        last: dict[int, int] = {}
        for line in self.train:
            if isinstance(line.get("epoch"), int):
                last[line["epoch"]] = line["step"]
        if len(last) < 2:
            return None
        first_epoch, last_epoch = min(last), max(last)
        length = (last[last_epoch] - last[first_epoch]) / (last_epoch - first_epoch)
        return length if length > 0 else None  # a damaged log

    def window(self) -> tuple[float, float] | None:
        """The pruning window in steps, or None where it is not known."""
        if self.hook is None:
            return None
        epoch = self.steps_an_epoch() if self.by_epoch else 1.0
        if epoch is None or not {"max_epochs", "max_iters"} & self._loop.keys():
            return None
        begin, end, unit = run_window(self.hook, self._loop, epoch)
        return begin * unit, end * unit

    def phases(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Logged lines by phase; one of all lines in a dense run."""
        window = self.window()
        if window is None:
            return [("whole run", self.train)]
        begin, end = window
        parts = [
            [line for line in self.train if line["step"] <= begin],
            [line for line in self.train if begin < line["step"] <= end],
            [line for line in self.train if line["step"] > end],
        ]
        return [(name, lines) for name, lines in zip(PHASES, parts, strict=True) if lines]

    def wall_seconds(self) -> float | None:
        """Wall time of the training steps: each line's seconds a step times the steps since the line before."""
        return _seconds(self.train)

    def processor_seconds(self) -> float | None:
        """Processor time of the training processes, where every start of the run recorded it."""
        known = [seconds for record in self.records if (seconds := record.get("processor_seconds")) is not None]
        return math.fsum(known) if known and len(known) == len(self.records) else None


def _seconds(lines: list[dict[str, Any]]) -> float | None:
    total, before = 0.0, 0
    for line in lines:
        if not isinstance(line.get("time"), (int, float)):
            return None
        total += line["time"] * (line["step"] - before)
        before = line["step"]
    return total if lines else None


def read_run(folder: str | Path) -> RunRecord:
    """Reads a work folder.

    Lines of a log that are damaged (a kill cuts the last one off) and files that are none of ours are left out, and
    counted in ``remarks``; so are configs that cannot be read, where an older start of the run left one that can.

    Raises:
        ValueError: the folder is no run's: it does not exist, or holds no log or no config that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the work folder of a run, work_dirs/NAME as a rule")
    logs = sorted(folder.glob("*/vis_data/scalars.json"))
    if not logs:
        raise ValueError(
            f"{folder} is no run: it holds no */vis_data/scalars.json. Give the work folder of a training "
            "(--work-dir of mmitp train, work_dirs/NAME by default)"
        )
    cfg, unread = config_of_run(folder, logs)
    run = RunRecord(folder, folder.resolve().name, cfg, remarks=unread)
    run.hook = prune_hook_of(cfg)
    _read_scalars(run, logs)
    run.frozen = _json_object(run, folder / "pruning.json", *_FROZEN)
    run.checkpoint = _newest_checkpoint(folder)
    _find_slimmed(run)
    _read_results(run)
    for log in logs:
        record = _json_object(run, log.parents[1] / RECORD, *_RECORD)
        if record is not None:
            run.records.append(record)
    return run


def _read_scalars(run: RunRecord, logs: list[Path]) -> None:
    train: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, float]] = {}
    for log in logs:
        damaged = 0
        for text in log.read_text(encoding="utf-8", errors="replace").splitlines():
            line = _object(text)
            if line is None or not (is_count(line.get("step"), 0) and is_count(line.get("epoch", 1), 0)):
                damaged += bool(text.strip())
            elif "iter" in line and "lr" in line:
                if all(is_number(value) or isinstance(value, float) for value in line.values()):  # a loss may be NaN
                    train[line["step"]] = line
                else:
                    damaged += 1
            else:
                metrics = {k: v for k, v in line.items() if not k.startswith(_NO_METRIC)}
                validations.setdefault(line["step"], {}).update(_numbers(metrics))
        if damaged:
            run.remarks.append(f"{log.relative_to(run.folder)}: {_lines(damaged)} left out")
    run.train = [train[step] for step in sorted(train)]
    run.validations = [(step, metrics) for step, metrics in sorted(validations.items()) if metrics]


_NO_METRIC = ("step", "data_time", "time", "channels_kept/")  # the last are PruneHook's, at the freeze


def _lines(count: int) -> str:
    return "1 damaged line is" if count == 1 else f"{count} damaged lines are"


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if is_number(value)}


def _json_object(run: RunRecord, path: Path, needed: dict[str, Any], more: dict[str, Any]) -> dict[str, Any] | None:
    """A file's record, if it is one like the examples ``needed`` and, where it has these keys, ``more``."""
    if not path.is_file():
        return None
    value = _object(path.read_text(encoding="utf-8", errors="replace"))
    why = "" if value is None else _unlike(value, path.name, needed, more)
    if value is None or why:
        run.remarks.append(f"{path.relative_to(run.folder)} is damaged and left out" + (f": {why}" if why else ""))
        return None
    return value


def _unlike(value: dict[str, Any], name: str, needed: dict[str, Any], more: dict[str, Any]) -> str:
    example = needed | {key: inner for key, inner in more.items() if value.get(key) is not None}
    if why := unlike(value, example, name):
        return why
    lists = {key: value[key] for key, inner in example.items() if isinstance(inner, list)}
    return next((f"{name}.{key} has an empty entry" for key, entries in lists.items() if None in entries), "")


def _newest_checkpoint(folder: Path) -> Path | None:
    named = last_checkpoint(folder, [folder])
    if named is not None and named.is_file():
        return named
    saved = [*folder.glob("epoch_*.pth"), *folder.glob("iter_*.pth"), *folder.glob("stopped.pth")]
    return max(saved, key=lambda path: path.stat().st_mtime, default=None)


def _find_slimmed(run: RunRecord) -> None:
    """The slimmed network: a folder of mmitp slim, else what ``slim_at_end`` left and the newest checkpoint."""
    folders = sorted(path.parent for path in run.folder.glob("*/config.py"))
    for folder in sorted(folders, key=lambda path: not (path / "weights.pth").is_file()):
        # Only what may be a slimmed network's is run: a work folder may hold anybody's code.
        text = (folder / "config.py").read_text(encoding="utf-8", errors="replace")
        if "SlimModel" not in text and "_base_" not in text:
            continue
        try:
            cfg = read_config(folder / "config.py")
        except ValueError as error:
            run.remarks.append(str(error))
            continue
        if is_type(cfg.get("model"), "SlimModel"):
            run.slim_config = folder / "config.py"
            weights = folder / "weights.pth"
            run.slim_weights = weights if weights.is_file() else run.checkpoint
            return


def _read_results(run: RunRecord) -> None:
    for path in sorted([*run.folder.glob("*.json"), *run.folder.glob("*/*.json")]):
        if path.name in ("pruning.json", RECORD):
            continue
        content = _object(path.read_text(encoding="utf-8", errors="replace"))
        measured = content.pop("run", None) if content else None
        if not content or not isinstance(measured, dict):
            continue  # another kind of file
        why = _unlike(measured, "run", *_RECORD) or _unlike(content, path.name, {}, _ATTACKED)
        if why:
            run.remarks.append(f"{path.relative_to(run.folder)} is damaged and left out: {why}")
        else:
            run.results += _results_of(run, content, path, measured)


def _results_of(run: RunRecord, content: dict[str, Any], path: Path, measured: dict[str, Any]) -> Iterator[Result]:
    network = "slimmed" if _slimmed(run, measured) else "masked" if is_masked(run.cfg.get("model", {})) else "dense"
    if content.get("clean") is not None and content.get("attacked") is not None:
        yield Result(network, "clean", _numbers(content["clean"]), path, measured)
        attack = content.get("attack") or {}
        steps = f"-{attack.get('steps')}" if attack.get("name") == "pgd" else ""
        for eps, metrics in zip(content.get("eps") or [], content["attacked"], strict=False):
            name = f"{str(attack.get('name', 'attack')).upper()}{steps}, {attack.get('norm', '')}, eps {eps:g}/255"
            yield Result(network, name, _numbers(metrics), path, measured)
    elif metrics := _numbers(content):
        yield Result(network, "clean", metrics, path, measured)


def _slimmed(run: RunRecord, measured: dict[str, Any]) -> bool:
    """Whether a test was one of the slimmed network."""
    if measured.get("slimmed") is not None:
        return measured["slimmed"]
    # Files from before this was recorded: ``mmitp slim`` names its config so. A look into it, where it is still there.
    config = Path(str(measured.get("config", "")))
    if config.name != "config.py":
        return False
    for path in (config, run.folder / config.parent.name / config.name):
        if path.is_file():
            return "SlimModel" in path.read_text(encoding="utf-8", errors="replace")
    return run.pruned


def headline(names: list[str]) -> list[str]:
    """The figures that a benchmark is judged by, of all names of metrics."""
    chosen = [name for name in names if name.endswith("R40_moderate")]
    chosen += [name for name in names if name.split("/")[-1] in ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "top1", "top5")]
    return chosen or names[:4]
