"""tools/test.py on a CIFAR-10 folder of eight images: clean, a subset, an attack, and wrong command lines."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

from mmengine.registry import MODELS, init_default_scope

from mmitp.engine.config import load_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "cifar10" / "resnet20_cifar10.py")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    spec = importlib.util.spec_from_file_location("test_tool", ROOT / "tools" / "test.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (8, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": images, "labels": list(range(8))}))
    init_default_scope("mmpretrain")
    weights = tmp_path / "weights.pth"
    torch.save({"state_dict": MODELS.build(load_config(CONFIG).model).state_dict()}, weights)

    def main(*args: str) -> dict:
        out = tmp_path / "out.json"
        options = [f"test_dataloader.dataset.data_root={tmp_path}", "test_dataloader.batch_size=4"]
        command = ["test.py", CONFIG, str(weights), "--work-dir", str(tmp_path / "work"), "--json", str(out), *args]
        monkeypatch.setattr(sys, "argv", [*command, "--cfg-options", *options])
        tool.main()
        return json.loads(out.read_text())

    return main


def test_clean_and_attacked_figures_stand_in_one_table(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = run()
    report = run("--attack", "pgd", "--steps", "2", "--eps", "0", "8", "--alpha", "2", "--seed", "3")
    assert report["clean"] == report["attacked"][0] == clean
    assert report["attacked"][1].keys() == clean.keys()
    assert (report["images"], report["total"], report["eps"]) == (8, 8, [0.0, 8.0])
    assert report["attack"]["seed"] == 3
    assert report["largest"] == pytest.approx([0, 8], abs=1e-3)
    text = capsys.readouterr().out
    assert "PGD-2 (linf, step 2/255, restarts 1), objective truth, seed 3; all 8 images" in text
    assert (tmp_path / "out.png").is_file()


def test_a_subset_can_be_tested(run: Callable[..., dict]) -> None:
    assert run("--max-images", "1")["accuracy/top1"] in (0.0, 100.0)
    report = run("--max-images", "3", "--attack", "fgsm", "--eps", "2")
    assert (report["images"], report["total"]) == (3, 8)


def test_weights_of_another_network_are_refused(run: Callable[..., dict], tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    state = torch.load(weights)["state_dict"]
    complete = {f"module.{key}": value for key, value in state.items()} | {"module.extra": torch.zeros(1)}
    torch.save({"state_dict": complete}, weights)  # as a data-parallel wrapper left it, and more than is needed
    run()
    torch.save({"state_dict": {k: v for k, v in state.items() if not k.startswith("backbone.layer3.2")}}, weights)
    with pytest.raises(
        ValueError, match=r"weights.pth does not fit .*resnet20_cifar10.py: 10 keys missing \['backbone"
    ):
        run()
    torch.save({"state_dict": state | {"head.fc.bias": torch.zeros(11)}}, weights)
    with pytest.raises(ValueError, match=r"does not fit (.|\n)*head.fc.bias"):
        run()


def test_masks_are_not_left_out(run: Callable[..., dict], tmp_path: Path) -> None:
    masked = MODELS.build(load_config(CONFIG.replace("resnet20_cifar10", "resnet20_cifar10_psi50")).model)
    torch.save({"state_dict": masked.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth carries masks, but .*cifar10.py builds a network without"):
        run()


def test_files_that_are_no_checkpoints_are_named(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    damaged = weights.read_bytes()[:-500]
    for content in (b"# Title", b"", damaged):
        weights.write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            run()
        assert "weights.pth is not a checkpoint, or a damaged one" in capsys.readouterr().err
    torch.save([1, 2], weights)
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "holds a list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--attack pgd", "--attack and --eps go together"),
        ("--eps 8", "--attack and --eps go together"),
        ("--steps 5", "--attack and --eps go together"),
        ("--attack fgsm --eps 8 --steps 5", "are --attack pgd's"),
        ("--attack pgd --eps 8 --score-thr 0.2", "is --objective own's"),
        ("--attack pgd --eps -1", "eps must be finite and must not be negative, got -1"),
        ("--attack pgd --eps nan", "eps must be finite"),
        ("--attack pgd --eps 300", "eps=300 is in pixels/255"),
        ("--attack pgd --eps 8 --alpha 0", "alpha, the length of a step, must be positive"),
        ("--attack pgd --eps 8 --objective own", "objective 'own' is for detectors"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    run: Callable[..., dict], capsys: pytest.CaptureFixture[str], args: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        run(*args.split())
    assert message in capsys.readouterr().err
