"""What visualization back ends get of a pruned run."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from toy_config import tiny_config

from mmitp.engine.run import build_runner


def test_tensorboard_shows_the_pruners_scalars_at_every_step(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = tiny_config(tmp_path, epochs=4)
    backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
    cfg.visualizer = dict(type="Visualizer", vis_backends=backends)
    build_runner(cfg).train()
    folder = next(tmp_path.glob("*/vis_data"))
    lines = [json.loads(line) for line in (folder / "scalars.json").read_text().splitlines()]
    events = EventAccumulator(str(folder)).Reload()
    for name, steps in (("loss", range(1, 21)), ("ops_kept", range(1, 21)), ("b", range(6, 16))):
        logged = {line["step"]: line[name] for line in lines if name in line}
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert set(steps) <= set(shown)
        assert shown == pytest.approx(logged)
    frozen = {row["name"]: row for row in json.loads((tmp_path / "pruning.json").read_text())["layers"]}
    (kept,) = events.Scalars("channels_kept/body")
    assert kept.value == pytest.approx(frozen["body"]["in_kept"] / 8)
    assert kept.step == 15


def records(file: Path) -> Iterator[bytes]:
    """What a ``.wandb`` file holds: seven bytes of head, then LevelDB's log format (blocks of 32 KiB)."""
    raw, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = -at % 32768
        if 0 < left < 7:
            at += left
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        whole += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_weights_and_biases_gets_the_pruners_scalars_with_their_iteration(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)  # mmengine has it store every .py file below
    cfg = tiny_config(tmp_path / "run", epochs=4)
    backends = [
        dict(type="LocalVisBackend"),
        dict(type="WandbVisBackend", init_kwargs=dict(project="mmitp", mode="offline")),
    ]
    cfg.visualizer = dict(type="Visualizer", name="wandb_test", vis_backends=backends)
    build_runner(cfg).train()
    wandb.teardown()  # ends the run and the process that writes its file
    (file,) = tmp_path.rglob("*.wandb")
    history = []
    for raw in records(file):
        record = Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    scalars = next((tmp_path / "run").glob("*/vis_data/scalars.json")).read_text().splitlines()
    lines = [json.loads(line) for line in scalars]
    for name, steps in (("loss", range(1, 21)), ("ops_kept", range(1, 21)), ("b", range(6, 16))):
        logged = {line["iter"]: line[name] for line in lines if name in line and "iter" in line}
        shown = {row["iter"]: row[name] for row in history if name in row and "iter" in row}
        assert set(steps) <= set(shown)
        assert shown == pytest.approx(logged)
    (kept,) = [row["channels_kept/body"] for row in history if "channels_kept/body" in row]
    frozen = {row["name"]: row for row in json.loads((tmp_path / "run/pruning.json").read_text())["layers"]}
    assert kept == pytest.approx(frozen["body"]["in_kept"] / 8)
