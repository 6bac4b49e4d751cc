"""The CPU-sized KITTI configs and RTMDet-tiny on generated frames: they train, freeze, slim, load and export."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from mmengine import Config
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch.utils.flop_counter import FlopCounterMode

import mmitp  # noqa: F401  before mmdet, where compiled operators are missing
from mmitp.datasets.scenes import write_scenes
from mmitp.engine.config import load_config
from mmitp.engine.export import export_checkpoint
from mmitp.engine.run import build_runner
from mmitp.pruning import masked_layers

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "kitti"
SHORT = "centernet_dla34x025_kitti1348_short"
RTMDET = "rtmdet_tiny_kitti1348_short"
# Their clean twins are these without two hooks (test_kitti_configs.py).
TRAINED = [f"{SHORT}{suffix}" for suffix in ("_narrow50", "_robust", "_prune50_robust", "_prune50_paper")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", 6, seed=1, size=(192, 64), val_fraction=0.34)


def runner_of(name: str, data: Path, folder: Path, size: tuple[int, int] = (128, 64)):
    """A Runner of a config for two epochs of two steps on generated frames; a pruning window is the first epoch."""
    cfg = load_config(str(CONFIGS / f"{name}.py"), work_dir=str(folder))
    for part in ("train", "val", "test"):
        loader = cfg[f"{part}_dataloader"]
        loader.update(batch_size=2, num_workers=0, persistent_workers=False, pin_memory=False)
        loader.dataset.data_root = str(data)
        resize(loader.dataset.pipeline, size)
    cfg.val_evaluator.data_root = cfg.test_evaluator.data_root = str(data)
    cfg.train_cfg.update(max_epochs=2, val_interval=3)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint.interval = 2
    for hook in cfg.get("custom_hooks", []):
        if hook.type == "mmitp.PruneHook":
            hook.update(begin=0, end=1, input_shape=size[::-1])
        elif hook.type == "PipelineSwitchHook":
            hook.switch_epoch = 1
            resize(hook.switch_pipeline, size)
    return build_runner(cfg)


def resize(pipeline: list[ConfigDict], size: tuple[int, int]) -> None:
    for transform in pipeline:
        if transform.type == "mmitp.ScaleShiftCrop":
            transform.size = size


def macs_of(name: str) -> int:
    model = load_config(str(CONFIGS / f"{name}.py")).model
    with DefaultScope.overwrite_default_scope("mmdet"):
        network = MODELS.build(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 160, 512))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", TRAINED)
def test_short_configs_train_and_prune_on_generated_frames(name, data, tmp_path):
    runner = runner_of(name, data, tmp_path)
    runner.train()
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    assert (tmp_path / "epoch_2.pth").is_file()
    pruning = tmp_path / "pruning.json"
    assert pruning.is_file() == ("prune" in name)
    if "prune" in name:
        assert json.loads(pruning.read_text())["ratio"] <= 0.5
        # The paper's mode keeps its masks, the others train the slimmed network from the freeze on.
        assert bool(masked_layers(runner.model)) == ("paper" in name)


def test_the_narrow_control_costs_as_near_below_half_as_uniform_widths_do():
    dense, narrow = macs_of(SHORT), macs_of(f"{SHORT}_narrow50")
    assert dense == 634_142_720
    assert 0.498 < narrow / dense <= 0.5
    assert f"{narrow:,}" in (CONFIGS / f"{SHORT}_narrow50.py").read_text()


def test_both_rtmdets_have_the_operations_that_the_controls_config_states():
    dense, narrow = macs_of(RTMDET), macs_of(f"{RTMDET}_narrow50")
    assert 0.49 < narrow / dense <= 0.5
    stated = (CONFIGS / f"{RTMDET}_narrow50.py").read_text()
    assert f"{narrow:,}" in stated
    assert f"{dense:,}" in stated


@pytest.mark.parametrize(
    ("scenes", "short"),
    [("centernet_dla34x025_scenes_kitti_size", SHORT), ("rtmdet_tiny_scenes_kitti_size", RTMDET)],
)
@pytest.mark.parametrize("suffix", ["", "_narrow50"])
def test_both_starts_fit_their_networks(scenes, short, suffix):
    start, network = (Config.fromfile(CONFIGS / f"{name}{suffix}.py").model for name in (scenes, short))
    assert start == network


def test_a_pruned_run_takes_a_dense_start(data, tmp_path):
    dense = runner_of(SHORT, data, tmp_path / "dense")
    checkpoint = tmp_path / "start.pth"
    torch.save(dict(state_dict=dense.model.state_dict()), checkpoint)
    pruned = runner_of(f"{SHORT}_prune50", data, tmp_path / "pruned")
    pruned._load_from = str(checkpoint)
    pruned.load_or_resume()
    state = pruned.model.state_dict()
    for name, value in dense.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def test_rtmdet_trains(data, tmp_path):
    """With its averaged copy, whose BatchNorm statistics are averaged too, and its second pipeline."""
    runner = runner_of("rtmdet_tiny_kitti", data, tmp_path)
    runner.train()
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    scales = [t for t in runner.train_dataloader.dataset.pipeline.transforms if type(t).__name__ == "ScaleShiftCrop"]
    assert [t.prob for t in scales] == [0.0]  # the second pipeline's


def test_short_rtmdet_prunes_by_fisher_and_averages_the_small_network(data, tmp_path):
    runner = runner_of(f"{RTMDET}_prune50_fisher", data, tmp_path)
    runner.train()
    assert json.loads((tmp_path / "pruning.json").read_text())["ratio"] <= 0.5
    average = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module
    assert sum(p.numel() for p in average.parameters()) == sum(p.numel() for p in runner.model.parameters())
    assert not masked_layers(runner.model)
    cfg = Config.fromfile(CONFIGS / f"{RTMDET}_prune50_fisher.py")
    *_, prune = cfg.custom_hooks
    assert (prune.push, prune.begin, prune.end) == ("fisher", 1, 3)


@pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="onnx and onnxruntime are not installed (extra: export)",
)
def test_pruned_robust_rtmdet_is_slimmed_with_its_average_and_exported(data, tmp_path):
    from mmdet.apis import init_detector

    runner = runner_of("rtmdet_tiny_kitti_prune50_robust", data, tmp_path / "work")
    runner.train()
    pruning = json.loads((tmp_path / "work" / "pruning.json").read_text())
    assert pruning["ratio"] <= 0.5
    config, weights = str(tmp_path / "work" / "slim" / "config.py"), str(tmp_path / "work" / "epoch_2.pth")
    small = init_detector(config, weights, device="cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small(torch.zeros(1, 3, 64, 128))
    assert counter.get_total_flops() == 2 * pruning["macs_kept"]
    # A checkpoint of an averaged run holds the average, which has been slimmed along.
    average = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module
    for name, value in average.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=0, atol=0)
    out = tmp_path / "small.onnx"
    export_checkpoint(load_config(config), weights, str(out), (64, 128))  # compares in onnxruntime
    assert out.is_file()
