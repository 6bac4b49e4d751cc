"""tools/test.py on a CIFAR-10 folder of eight images: clean, a subset, an attack, and wrong command lines."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS, init_default_scope

from mmitp.engine.config import load_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "cifar10" / "resnet20_cifar10.py")


@METRICS.register_module()
class NotANumber(BaseMetric):
    """Figures that no JSON holds, and one that is no number."""

    default_prefix = "some"

    def process(self, data_batch: object, data_samples: list) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list) -> dict:
        return dict(nan=math.nan, nested=torch.tensor([1.0, -math.inf]))


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

    def main(*args: str, config: str = CONFIG, json_name: str | None = "out.json") -> dict:
        out = tmp_path / (json_name or "none.json")
        options = [f"test_dataloader.dataset.data_root={tmp_path}", "test_dataloader.batch_size=4"]
        command = ["test.py", config, str(weights), "--work-dir", str(tmp_path / "work")]
        command += ["--json", str(out)] if json_name else []
        monkeypatch.setattr(sys, "argv", [*command, *args, "--cfg-options", *options])
        assert tool.main() == 0
        return json.loads(out.read_text(), parse_constant=pytest.fail) if out.is_file() else {}

    return main


def test_clean_and_attacked_figures_stand_in_one_table(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = run()
    del clean["run"]
    report = run("--attack", "pgd", "--steps", "2", "--eps", "0", "8", "--alpha", "2", "--seed", "3")
    assert report["clean"] == report["attacked"][0] == clean
    assert report["attacked"][1].keys() == clean.keys()
    assert (report["images"], report["total"], report["eps"]) == (8, 8, [0.0, 8.0])
    assert report["attack"]["seed"] == 3
    assert report["largest"] == pytest.approx([0, 8], abs=1e-3)
    text = capsys.readouterr().out
    assert "PGD-2 (linf, step 2/255, restarts 1), objective truth, seed 3; all 8 images" in text
    assert (tmp_path / "out.png").is_file()


def test_results_say_what_they_were_measured_with_and_none_is_lost(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run()
    made = first["run"]
    assert made["config"] == CONFIG
    assert made["checkpoint"] == str(tmp_path / "weights.pth")
    assert made["checkpoint_sha256"] == hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    assert made["device"].startswith("cpu")
    assert (made["images"], made["of_images"]) == (8, 8)
    assert made["slimmed"] is False
    assert isinstance(made["seed"], int)
    assert made["command"][:2] == ["test.py", CONFIG]
    assert {"torch", "mmitp", "mmcv", "mmengine", "mmpretrain", "python"} <= made["versions"].keys()
    second = run("--max-images", "3")
    assert (second["run"]["images"], second["run"]["of_images"]) == (3, 8)
    assert json.loads((tmp_path / "out_2.json").read_text()) == first
    assert f"the former out.json is now {tmp_path / 'out_2.json'}" in capsys.readouterr().out


def test_results_under_attack_are_named_by_attack_and_network(run: Callable[..., dict], tmp_path: Path) -> None:
    work = tmp_path / "work"

    def names(*args: str) -> set[str]:
        before = {path.name for path in work.glob("robustness*")}
        run(*args, "--eps", "2", "--max-images", "4", json_name=None)
        return {path.name for path in work.glob("robustness*")} - before

    parent = tmp_path.name
    assert names("--attack", "fgsm") == {f"robustness_fgsm-linf_{parent}_weights.json"}
    assert names("--attack", "pgd", "--steps", "2") == {f"robustness_pgd2-linf_{parent}_weights.json"}
    assert names("--attack", "fgsm", "--norm", "l2") == {f"robustness_fgsm-l2_{parent}_weights.json"}
    (tmp_path / "slim").mkdir()
    (tmp_path / "weights.pth").rename(tmp_path / "slim" / "weights.pth")
    (tmp_path / "weights.pth").symlink_to(tmp_path / "slim" / "weights.pth")
    assert names("--attack", "fgsm") == {"robustness_fgsm-linf_slim_weights.json"}
    assert names("--attack", "fgsm") == {"robustness_fgsm-linf_slim_weights_2.json"}


def test_lists_and_figures_that_are_not_finite_are_kept(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of classes' figures ended the test in a TypeError and an empty file, NaN in a file that is no JSON."""
    config = tmp_path / "config.py"
    metric = "dict(type='mmpretrain.SingleLabelMetric', average=None), dict(type='NotANumber')"
    config.write_text(f"_base_ = [{CONFIG!r}]\ntest_evaluator = [{metric}]\n")
    report = run(config=str(config))
    assert len(report["single-label/precision_classwise"]) == 10
    assert (report["some/nan"], report["some/nested"]) == (None, [1.0, None])
    assert report["run"]["not_finite"] == {"some/nan": "nan", "some/nested[1]": "-inf"}
    assert "not finite, null in the file: some/nan (nan), some/nested[1] (-inf)" in capsys.readouterr().out
    attacked = run("--attack", "fgsm", "--eps", "0", "2", config=str(config))
    assert attacked["attacked"][0] == {key: value for key, value in report.items() if key != "run"}
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("some/")]
    assert rows == ["some/nan"]  # in the table; what is no single number stands in the file alone


def test_where_nothing_can_be_written_is_said_before_the_test(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmengine.runner.Runner.from_cfg", lambda cfg: pytest.fail("a runner was built"))
    (tmp_path / "file").write_text("")
    for name, says in (("file/out.json", "results cannot be written to"), (".", "is a folder")):
        with pytest.raises(SystemExit, match="2"):
            run(json_name=name)
        assert says in capsys.readouterr().err


def test_a_subset_can_be_tested(run: Callable[..., dict]) -> None:
    assert run("--max-images", "1")["accuracy/top1"] in (0.0, 100.0)
    report = run("--max-images", "3", "--attack", "fgsm", "--eps", "2")
    assert (report["images"], report["total"]) == (3, 8)


def test_weights_of_another_network_are_refused(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    state = torch.load(weights)["state_dict"]
    complete = {f"module.{key}": value for key, value in state.items()} | {"module.extra": torch.zeros(1)}
    torch.save({"state_dict": complete}, weights)  # as a data-parallel wrapper left it, and more than is needed
    run()
    torch.save({"state_dict": {k: v for k, v in state.items() if not k.startswith("backbone.layer3.2")}}, weights)
    with pytest.raises(SystemExit, match="2"):
        run()
    said = capsys.readouterr().err
    assert re.search(r"mmitp test: .*weights.pth does not fit .*resnet20_cifar10.py: 10 keys missing \['backbone", said)
    torch.save({"state_dict": state | {"head.fc.bias": torch.zeros(11)}}, weights)
    with pytest.raises(SystemExit, match="2"):
        run()
    assert re.search(r"does not fit (.|\n)*head.fc.bias", capsys.readouterr().err)


def test_weights_of_a_compiled_network_are_tested_as_its_own(run: Callable[..., dict], tmp_path: Path) -> None:
    expected = run()["accuracy/top1"]
    weights = tmp_path / "weights.pth"
    state = torch.load(weights)["state_dict"]
    torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, weights)
    assert run()["accuracy/top1"] == expected


def test_masks_are_not_left_out(run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked = MODELS.build(load_config(CONFIG.replace("resnet20_cifar10", "resnet20_cifar10_psi50")).model)
    torch.save({"state_dict": masked.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match="2"):
        run()
    assert re.search(r"weights.pth carries masks, but .*cifar10.py builds a network without", capsys.readouterr().err)


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
        ("--attack fgsm --eps 2 2", "eps needs at least one size"),
        ("--max-images 0", "--max-images: must be at least 1"),
        ("--max-images 9", "cannot take 9 of 8 test images"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str], args: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*args.split())
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_every_tested_image_is_drawn_on_request(run: Callable[..., dict], tmp_path: Path) -> None:
    run("--show-dir", str(tmp_path / "drawn"))
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 8
    with pytest.raises(SystemExit, match="2"):
        run("--show-dir", str(tmp_path / "drawn"), "--attack", "fgsm", "--eps", "8")
