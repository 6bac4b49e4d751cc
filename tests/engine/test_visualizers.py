"""What visualization back ends get of a pruned run."""

import json
import sys
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
