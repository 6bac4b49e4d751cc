"""CenterNet (deformable) under attack, slimmed in mid-run; what its checkpoints load with afterwards."""

from pathlib import Path

import pytest
import torch

import mmitp  # noqa: F401  before mmdet, where compiled operators are missing
from mmitp.datasets.scenes import write_scenes
from mmitp.engine.config import load_config
from mmitp.engine.export import export_checkpoint
from mmitp.engine.run import build_runner
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.pruning import masked_layers

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "demo" / "centernet_scenes_prune50.py")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    data = write_scenes(folder / "scenes", 8, seed=1, size=(192, 64), val_fraction=0.25)
    options = [f"{name}.data_root={data}/" for name in ("val_evaluator", "test_evaluator")]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        options += [f"{loader}.dataset.data_root={data}/", f"{loader}.num_workers=0"]
        options += [f"{loader}.persistent_workers=False", f"{loader}.batch_size=3"]
    options += ["train_cfg.max_epochs=3", "train_cfg.val_interval=3", "default_hooks.checkpoint.interval=3"]
    options += ["custom_hooks.0.begin=0", "custom_hooks.0.end=1", "custom_hooks.0.input_shape=(64,192)"]
    options += ["custom_hooks.0.slim_at_end=True"]

    def config(source=CONFIG, name="work", extra=options):
        cfg = load_config(str(source), extra, str(folder / name))
        cfg.custom_hooks.append(dict(type="mmitp.AdversarialHook", eps=2))
        return cfg

    runner = build_runner(config())
    runner.train()
    return dict(runner=runner, folder=folder, config=config, checkpoint=str(folder / "work" / "epoch_3.pth"))


def test_the_small_network_was_trained(job):
    assert not masked_layers(job["runner"].model)
    hook = next(h for h in job["runner"].hooks if hasattr(h, "slimmed"))
    assert hook.slimmed["macs_kept"] <= 0.5 * hook.slimmed["macs_dense"]


def test_its_checkpoint_is_evaluated_by_the_slim_config_and_by_the_training_config(job):
    expected = job["runner"].val_loop.run()
    for source, name in ((CONFIG, "a"), (job["folder"] / "work" / "slim" / "config.py", "b")):
        cfg = job["config"](source, name) if source == CONFIG else job["config"](source, name, [])
        cfg.load_from = job["checkpoint"]
        runner = build_runner(cfg)
        assert runner.test() == pytest.approx(expected, abs=1e-3)
        loaded = runner.model.state_dict()
        for key, value in job["runner"].model.state_dict().items():
            assert torch.equal(loaded[key], value), key


def test_the_slim_tool_takes_it_as_it_is(job):
    folder = str(job["folder"] / "slim")
    report = slim_checkpoint(job["config"](), job["checkpoint"], folder)
    assert report.params_slim == sum(p.numel() for p in job["runner"].model.parameters())
    assert report.macs_slim <= 0.5 * report.macs_dense
    state = torch.load(report.weights, weights_only=False)["state_dict"]
    for name, value in job["runner"].model.state_dict().items():
        assert torch.equal(state[name], value), name
    with pytest.raises(ValueError, match="leave --shape out"):
        slim_checkpoint(job["config"](), job["checkpoint"], folder, (32, 64))


def test_it_is_exported_by_the_training_config(job):
    report = export_checkpoint(job["config"](), job["checkpoint"], str(job["folder"] / "net.pt"))
    assert report.parameters == sum(p.numel() for p in job["runner"].model.parameters())
