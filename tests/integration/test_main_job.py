"""The main job end to end on a handful of generated scenes: train and prune, slim, evaluate, load elsewhere."""

import base64
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmitp  # noqa: F401  before mmdet, where compiled operators are missing
from mmitp.datasets.scenes import write_scenes
from mmitp.engine.config import load_config
from mmitp.engine.robust_eval import EvalAttack, attacked
from mmitp.engine.run import build_runner
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.pruning import masked_layers
from mmitp.report import measure, read_run

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "demo" / "centernet_scenes_prune50.py")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two epochs of the demo's config on twelve small frames; the masks freeze after the first."""
    folder = tmp_path_factory.mktemp("job")
    data = write_scenes(folder / "scenes", 12, seed=1, size=(192, 64), val_fraction=0.25)
    options = [f"{name}.data_root={data}/" for name in ("val_evaluator", "test_evaluator")]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        options += [f"{loader}.dataset.data_root={data}/", f"{loader}.num_workers=0"]
        options += [f"{loader}.persistent_workers=False", f"{loader}.batch_size=3"]
    options += ["train_cfg.max_epochs=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    options += ["visualizer.name=main_job"]  # mmengine keeps visualizers by name, and an earlier one writes elsewhere
    options += ["custom_hooks.0.begin=0", "custom_hooks.0.end=1", "custom_hooks.0.input_shape=(64,192)"]
    cfg = load_config(CONFIG, options, str(folder / "work"))
    runner = build_runner(cfg)
    runner.train()
    report = slim_checkpoint(load_config(CONFIG, options), str(folder / "work" / "epoch_2.pth"), str(folder / "slim"))
    return dict(folder=folder, data=data, runner=runner, report=report, options=options)


def test_the_budget_is_kept(job):
    pruning = json.loads((job["folder"] / "work" / "pruning.json").read_text())
    assert pruning["ratio"] <= 0.5
    assert pruning["macs_kept"] == job["report"].macs_slim
    assert pruning["macs_dense"] == job["report"].macs_dense


def test_the_slimmed_checkpoint_loads_with_mmdets_init_detector_and_predicts_the_same(job):
    from mmdet.apis import inference_detector, init_detector

    small = init_detector(job["report"].config, job["report"].weights, device="cpu")
    assert not masked_layers(small)
    assert not any("prune" in key for key in small.state_dict())
    masked = job["runner"].model.eval()
    x = torch.randn(1, 3, 64, 192, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small_maps = small(x)
    assert counter.get_total_flops() == 2 * job["report"].macs_slim
    with torch.no_grad():
        for a, b in zip(masked(x), small_maps, strict=True):
            torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    image = cv2.imread(str(job["data"] / "training" / "image_2" / "000000.png"))
    small.cfg.test_dataloader.dataset.pipeline = small.cfg.test_pipeline
    assert len(inference_detector(small, image).pred_instances.scores) == 100


def test_the_test_tool_gives_the_slimmed_network_the_same_ap(job):
    out = job["folder"] / "ap.json"
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "test.py"), job["report"].config, job["report"].weights]
        + ["--out", str(out), "--work-dir", str(job["folder"] / "test"), "--show-dir", str(job["folder"] / "drawn")],
        check=True,
        capture_output=True,
    )
    slimmed = json.loads(out.read_text())
    masked = job["runner"].val_loop.run()
    assert set(slimmed) == {*masked, "run"}
    for name, value in masked.items():
        assert slimmed[name] == pytest.approx(value, abs=1e-3), name
    assert len(list((job["folder"] / "drawn").iterdir())) == slimmed["run"]["images"]


def test_a_runs_detections_are_drawn_beside_the_truth_clean_and_under_attack(job, monkeypatch):
    run, logs = read_run(job["folder"] / "work"), []

    @contextmanager
    def noted(*args):
        with attacked(*args) as log:
            logs.append(log)
            yield log

    monkeypatch.setattr(measure, "attacked", noted)
    clean = measure.sample_detections(run, 2)
    under = measure.sample_detections(run, 2, attack=EvalAttack(steps=1), eps=2.0)
    for sample in (clean, under):
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(sample.jpeg), np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape[1] / picture.shape[0] == pytest.approx((2 * 768 + 4) / (2 * (256 + 22)), rel=0.01)
    (log,) = logs
    assert log.batches == 2
    assert 0 < log.largest <= 2.001


def test_missing_data_is_an_error_that_says_where_it_belongs(job):
    cfg = load_config(str(ROOT / "configs" / "centernet_kitti_prune50.py"), work_dir=str(job["folder"] / "none"))
    cfg.train_dataloader.dataset.data_root = str(job["folder"] / "nowhere")
    cfg.launcher = "none"
    with pytest.raises((FileNotFoundError, ValueError), match=r"data/README\.md"):
        build_runner(cfg).train()


def test_slimming_what_was_never_masked_is_refused(job):
    cfg = load_config(str(ROOT / "configs" / "kitti" / "centernet_dla34_kitti.py"))
    with pytest.raises(ValueError, match="MaskedModel"):
        slim_checkpoint(cfg, "none.pth", str(job["folder"] / "x"))
