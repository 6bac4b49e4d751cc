"""What a training starts from fits its network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toy_config import TinyNet, tiny_config

from mmitp.engine.run import build_runner
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.models.masked import MaskedModel


def start(tmp_path: Path, state: dict[str, torch.Tensor]) -> Any:
    """Begins to train from these weights, and returns the network then."""
    torch.save(dict(state_dict=state), tmp_path / "start.pth")
    runner = build_runner(tiny_config(tmp_path / "run", load_from=str(tmp_path / "start.pth")))
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.load_or_resume()
    return runner.model


def test_weights_of_this_network_and_of_a_part_of_it_are_taken(tmp_path: Path) -> None:
    state = TinyNet().state_dict()
    part = {key: value for key, value in state.items() if key.startswith("stem")}
    for given in (state, part, dict(state, **{"fc.weight": torch.ones(5, 8), "fc.bias": torch.ones(5)})):
        assert torch.equal(start(tmp_path, given).stem.weight, state["stem.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    state = TinyNet().state_dict()
    with pytest.raises(ValueError, match=r"no name in it is one of the network's \(it has 'net\.stem\.weight'"):
        start(tmp_path, {f"net.{key}": value for key, value in state.items()})
    wider = {key: value.repeat_interleave(2, 0) if value.dim() else value for key, value in state.items()}
    with pytest.raises(
        ValueError, match=r"10 of the 10 tensors .* are of other shapes \('stem\.weight' is \(16, 3, 3, 3\)"
    ):
        start(tmp_path, wider)


def test_a_slimmed_network_is_no_start_of_a_masked_one(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "first", epochs=4)
    build_runner(cfg).train()
    small = tmp_path / "small"
    slim_checkpoint(cfg, str(tmp_path / "first/epoch_4.pth"), str(small), (8, 8))
    says = "It is a smaller network's: train that on by the config.py beside it; to prune further, start from a"
    with pytest.raises(ValueError, match=says):
        build_runner(tiny_config(tmp_path / "second", load_from=str(small / "weights.pth"))).train()
    with pytest.raises(ValueError, match="model.of is a slimmed network's, which gets no masks; to prune further"):
        MaskedModel(of="mmitp.SlimModel", slim={})
    again = tiny_config(tmp_path / "third", epochs=4, load_from=str(tmp_path / "first/epoch_4.pth"))
    again.custom_hooks[0].target = 0.25
    build_runner(again).train()  # as the message says
    report = slim_checkpoint(again, str(tmp_path / "third/epoch_4.pth"), str(tmp_path / "less"), (8, 8))
    assert report.macs_slim <= 0.25 * report.macs_dense
