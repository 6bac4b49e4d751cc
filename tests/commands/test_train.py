"""``mmitp train``'s options as mmdet has them, in real runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from toy_config import TinyNet, tiny_config

from mmitp.commands.train import main
from mmitp.engine.config import draw_predictions
from mmitp.engine.run import build_runner


def test_the_learning_rate_is_scaled_by_the_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config(tmp_path, epochs=3)
    batch, rate = cfg.train_dataloader.batch_size, cfg.optim_wrapper.optimizer.lr
    cfg.dump(str(tmp_path / "plain.py"))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "plain.py"), "--auto-scale-lr"])
    assert "set auto_scale_lr = dict(base_batch_size=...)" in capsys.readouterr().err

    cfg.auto_scale_lr = dict(base_batch_size=4 * batch)
    cfg.dump(str(tmp_path / "scaled.py"))
    rates = []

    def spy(cfg: Any, trust: bool) -> Any:
        runner = build_runner(cfg, trust)
        train = runner.train
        runner.train = lambda: (train(), rates.append(runner.optim_wrapper.param_groups[0]["initial_lr"]))
        return runner

    monkeypatch.setattr("mmitp.engine.run.build_runner", spy)
    for options in ([], ["--auto-scale-lr"]):
        assert main([str(tmp_path / "scaled.py"), "--work-dir", str(tmp_path / f"work{len(options)}"), *options]) == 0
    assert rates == [rate, pytest.approx(rate / 4)]


def test_resume_takes_the_configs_weights_where_there_is_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = TinyNet().state_dict()
    weights["fc.bias"].fill_(50)
    torch.save(dict(state_dict=weights, meta={}), tmp_path / "dense.pth")
    tiny_config(tmp_path, epochs=3, load_from=str(tmp_path / "dense.pth")).dump(str(tmp_path / "tiny.py"))
    started = []

    def spy(cfg: Any, trust: bool) -> Any:
        runner = build_runner(cfg, trust)

        def train() -> None:
            runner.load_or_resume()
            started.append((cfg.resume, runner.model.fc.bias.tolist()))

        runner.train = train
        return runner

    monkeypatch.setattr("mmitp.engine.run.build_runner", spy)
    assert main([str(tmp_path / "tiny.py"), "--work-dir", str(tmp_path / "work"), "--resume"]) == 0
    assert started == [(False, [50.0, 50.0])]


def test_mixed_precision_without_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmengine.device.get_device", lambda: "cpu")
    tiny_config(tmp_path, epochs=3).dump(str(tmp_path / "tiny.py"))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "tiny.py"), "--amp"])
    assert "--amp: mixed precision" in capsys.readouterr().err


def test_drawing_is_refused_where_nothing_draws(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--show-dir draws for configs of mmdet and mmpretrain"):
        draw_predictions(tiny_config(tmp_path, epochs=3), str(tmp_path / "drawn"))
