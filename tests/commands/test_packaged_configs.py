"""Configs travel with the package: named as ``mmitp::folder/name.py``, listed in the index, and in the wheel."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from mmengine import Config
from mmengine.registry import init_default_scope

from mmitp.engine.config import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py"))
OWN = '_base_ = ["mmitp::kitti/centernet_dla34_kitti_prune50.py"]\nmodel = dict(backbone=dict(width=0.25))\n'


def test_a_packaged_config_is_the_file(tmp_path: Path) -> None:
    file = load_config(str(ROOT / "configs" / "kitti" / "centernet_dla34_kitti_prune50.py"))
    packaged = load_config("mmitp::kitti/centernet_dla34_kitti_prune50")
    assert packaged.to_dict() == file.to_dict()
    (tmp_path / "own.py").write_text(OWN)
    own = Config.fromfile(str(tmp_path / "own.py"))
    assert (own.model.type, own.model.backbone.width) == ("mmitp.MaskedModel", 0.25)
    own.model.backbone.width = file.model.backbone.width
    assert own.to_dict() == {key: value for key, value in file.to_dict().items() if key != "work_dir"}


def test_what_a_config_takes_from_a_packaged_one_is_built_in_the_scope_it_had(tmp_path: Path) -> None:
    from mmdet.registry import TRANSFORMS

    text = '_base_ = ["mmitp::kitti/centernet_dla34_kitti_prune50.py"]\nlast = _base_.test_pipeline[-1]\n'
    (tmp_path / "own.py").write_text(text)
    cfg = Config.fromfile(str(tmp_path / "own.py"))
    init_default_scope(cfg.default_scope)
    assert type(TRANSFORMS.build(cfg.last)).__name__ == "PackDetInputs"


def test_the_index_lists_every_experiment_and_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "metafiles.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    load_model_index = pytest.importorskip("modelindex.load_model_index")
    index = load_model_index.load(str(ROOT / "model-index.yml"))
    listed = {Path(model.config) for model in index.models}
    experiments = {p for p in CONFIGS if len(p.parts) > 2 and not p.parts[1].startswith("_")}
    assert listed == {p for p in experiments if p.parent.name != "weights"}  # those are results
    by_name = {model.name: model for model in index.models}
    assert len(by_name) == len(listed)
    assert all(name == Path(model.config).stem for name, model in by_name.items())
    results = by_name["resnet20_cifar10_psi30_short"].results[0]
    assert (results.task, results.dataset, results.metrics["seeds"] >= 2) == ("Image Classification", "CIFAR-10", True)


def test_results_are_the_means_of_finished_runs_of_the_config_itself(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    metafiles = importlib.import_module("metafiles")
    run = dict(state="finished", config="net", options=[])
    files = {
        "a_s0": run | dict(accuracy=80.0),
        "a_s1": run | dict(accuracy=81.0),
        "a_s2": run | dict(state="running", accuracy=10.0),
        "b_s0": run | dict(options=["lr=1"], accuracy=20.0),
        "c_s0": run | dict(ranking="l1", accuracy=30.0),
        "d_s0": run | dict(inner_widths=[1], accuracy=40.0),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert metafiles.sweep_results(tmp_path) == {"net": {"Top 1 Accuracy": 80.5, "seeds": 2}}


def test_a_wheel_holds_every_config_and_works_by_itself(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("mmitp", "configs", "tools"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "model-index.yml"):
        shutil.copy(ROOT / name, tree)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=tree, capture_output=True, text=True, check=True
    )
    installed = tmp_path / "installed"
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(installed)
    for path in (*CONFIGS, Path("model-index.yml"), Path("tools/dist_train.sh")):
        assert (installed / "mmitp" / ".mim" / path).read_bytes() == (ROOT / path).read_bytes(), path
    entry = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "mmitp = mmitp.commands:main" in entry
    (tmp_path / "own.py").write_text(OWN)
    look = (
        "import mmitp; from mmengine import Config; "
        "print(mmitp.__file__, Config.fromfile('own.py').model.of, Config.fromfile('own.py').model.backbone.width)"
    )
    said = subprocess.run(
        [sys.executable, "-c", look],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    ).stdout.split()
    assert said == [str(installed / "mmitp" / "__init__.py"), "mmdet.CenterNet", "0.25"]
