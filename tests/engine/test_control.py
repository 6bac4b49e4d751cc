"""``mmitp control``: the config, and the weights to start from, of a network that pruning has to beat."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from mmengine.config import Config
from mmengine.registry import MODELS
from toy_config import TinyNet, tiny_config

from mmitp.commands import control
from mmitp.engine.narrow import narrow_control
from mmitp.engine.run import build_runner

#: of TinyNet's 8 channels after each of its two convolutions; of half of the operations 5 and 6 would be too many
KEPT = 5


def macs(stem: int, body: int) -> int:
    """TinyNet's operations at 8x8, with so many channels after its two convolutions."""
    return 64 * 9 * (3 * stem + stem * body) + 2 * body


def config(tmp_path: Path, **more: object) -> Config:
    return tiny_config(tmp_path / "run", epochs=2, **more)


def test_it_is_the_pruned_configs_network_built_narrower_and_it_trains(tmp_path: Path) -> None:
    report = narrow_control(config(tmp_path), str(tmp_path / "control"), shape=(8, 8))
    assert (report.macs_dense, report.macs) == (macs(8, 8), macs(5, 5))
    assert report.start == "random weights"
    assert not (tmp_path / "control/weights.pth").exists()
    cfg = Config.fromfile(report.config)
    assert cfg.custom_hooks == [] and cfg.load_from is None
    assert cfg.work_dir == str(tmp_path / "run_control")  # not the pruned run's
    runner = build_runner(cfg)
    assert (runner.model.stem.out_channels, runner.model.norm.num_features, runner.model.body.in_channels) == (5, 5, 5)
    assert (runner.model.body.out_channels, runner.model.fc.in_features) == (5, 5)  # linear layers read no more
    runner.train()
    assert runner.iter == 10


def test_operations_are_counted_at_the_size_of_the_data_where_the_config_states_none(tmp_path: Path) -> None:
    report = narrow_control(config(tmp_path), str(tmp_path / "control"))
    assert (report.shape, report.macs_dense) == ((8, 8), macs(8, 8))
    assert "\n8x8 is the size of the first training image" in report.text()


@pytest.mark.parametrize("given", ["load_from", "weights"])
def test_it_starts_from_the_largest_channels_of_the_weights_that_the_run_starts_from(
    given: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    dense, path = TinyNet(), str(tmp_path / "dense.pth")
    first, second = [0, 1, 4, 5, 6], [1, 2, 3, 5, 7]
    dense.body.weight.data[:, first] *= 100
    dense.fc.weight.data[:, second] *= 100
    torch.save(dict(state_dict=dense.state_dict()), path)
    cfg = config(tmp_path)
    if given == "load_from":
        cfg.load_from = path
    report = narrow_control(cfg, str(tmp_path / "control"), weights=path if given == "weights" else None, shape=(8, 8))
    written = Config.fromfile(report.config)
    assert Path(written.load_from) == tmp_path / "control/weights.pth"
    runner = build_runner(written)
    runner.load_or_resume()
    torch.testing.assert_close(runner.model.stem.weight, dense.stem.weight[first])
    torch.testing.assert_close(runner.model.body.weight, dense.body.weight[second][:, first])
    torch.testing.assert_close(runner.model.fc.weight, dense.fc.weight[:, second])

    scratch = narrow_control(cfg, str(tmp_path / "scratch"), scratch=True, shape=(8, 8))
    assert (scratch.start, Config.fromfile(scratch.config).load_from) == ("random weights", None)
    assert scratch.macs == report.macs


def test_weights_for_other_classes_are_taken_but_for_the_classifier(tmp_path: Path) -> None:
    """As mmengine does with a run's load_from: the classifier is drawn at random then, by the control's own seed."""
    dense, path = TinyNet(), str(tmp_path / "dense.pth")
    state = {**dense.state_dict(), "fc.weight": torch.ones(5, 8), "fc.bias": torch.ones(5)}
    torch.save(dict(state_dict=state), path)
    cfg = config(tmp_path)
    cfg.load_from = path
    report = narrow_control(cfg, str(tmp_path / "control"), shape=(8, 8))
    assert report.start.endswith("fc.weight, fc.bias do not fit and are random, as in the run itself")
    kept = torch.load(tmp_path / "control/weights.pth", weights_only=True)["state_dict"]
    assert set(dense.state_dict()) - set(kept) == {"fc.weight", "fc.bias"}
    runner = build_runner(Config.fromfile(report.config))
    runner.train()
    assert runner.iter == 10


@MODELS.register_module()
class TinyPretrained(TinyNet):
    """A backbone that loads its weights as mmengine's do."""

    def __init__(self, init_cfg: dict | None = None) -> None:
        super().__init__()
        self.start = init_cfg

    def init_weights(self) -> None:
        if self.start is not None:
            self.load_state_dict(torch.load(self.start["checkpoint"])["state_dict"])


def test_pre_trained_parts_are_taken_along(tmp_path: Path) -> None:
    torch.manual_seed(1)
    dense, path = TinyNet(), str(tmp_path / "backbone.pth")
    torch.save(dict(state_dict=dense.state_dict()), path)
    cfg = config(tmp_path)
    cfg.model = dict(type="mmitp.MaskedModel", of="TinyPretrained", init_cfg=dict(type="Pretrained", checkpoint=path))
    report = narrow_control(cfg, str(tmp_path / "control"), shape=(8, 8))
    assert "pre-trained" in report.start
    kept = dense.body.weight.abs().sum((0, 2, 3)).topk(KEPT).indices.sort().values
    read = dense.fc.weight.abs().sum(0).topk(KEPT).indices.sort().values
    state = torch.load(tmp_path / "control/weights.pth", weights_only=True)["state_dict"]
    torch.testing.assert_close(state["body.weight"], dense.body.weight[read][:, kept].detach())
    assert Config.fromfile(report.config).model.init_cfg is None  # the narrow network's weights are the other file's


def test_a_dense_config_takes_a_target(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.model, cfg.custom_hooks = dict(type="TinyNet"), []
    with pytest.raises(ValueError, match="no PruneHook names a target: give --target"):
        narrow_control(cfg, str(tmp_path / "control"), shape=(8, 8))
    report = narrow_control(cfg, str(tmp_path / "control"), target=0.3, shape=(8, 8))
    assert report.macs == macs(3, 5)  # both a channel away from 4 of 8, whose operations are too many
    assert macs(3, 5) <= 0.3 * macs(8, 8) < macs(4, 4)
    even = narrow_control(cfg, str(tmp_path / "even"), target=0.6, divisor=4, shape=(8, 8))
    assert even.macs == macs(4, 8)


def test_a_target_of_parameters_is_one_of_parameters(tmp_path: Path) -> None:
    report = narrow_control(config(tmp_path, hook=dict(cost="params")), str(tmp_path / "control"), shape=(8, 8))
    # five channels each: (27 + 1) * 5 of the stem, 2 * 5 of the norm, 9 * 25 + 5 of the body, 2 * 5 + 2 of the last
    assert (report.params_dense, report.params) == (224 + 16 + 584 + 18, 140 + 10 + 230 + 12)


def test_linear_layers_that_the_config_leaves_alone_stay_whole(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.model.prune = dict(linear=False)
    report = narrow_control(cfg, str(tmp_path / "control"), shape=(8, 8))
    assert report.macs == macs(3, 8)


def test_what_is_refused(tmp_path: Path) -> None:
    cfg, out = config(tmp_path), str(tmp_path / "control")
    slimmed = Config.fromfile(narrow_control(cfg, out, shape=(8, 8)).config)
    with pytest.raises(ValueError, match="slimmed network's config.*train this one"):
        narrow_control(slimmed, str(tmp_path / "other"), target=0.5, shape=(8, 8))
    torch.save(dict(state_dict={"body.prune_mask": torch.ones(8)}), tmp_path / "pruned.pth")
    with pytest.raises(ValueError, match="has masks: .*--scratch"):
        narrow_control(cfg, out, weights=str(tmp_path / "pruned.pth"), shape=(8, 8))
    torch.save(dict(state_dict={"stem.weight": torch.ones(8, 3, 3, 3)}), tmp_path / "part.pth")
    with pytest.raises(ValueError, match="part.pth does not fit"):
        narrow_control(cfg, out, weights=str(tmp_path / "part.pth"), shape=(8, 8))
    with pytest.raises(ValueError, match="target 0.01 is out of reach"):
        narrow_control(cfg, out, target=0.01, shape=(8, 8))
    with pytest.raises(ValueError, match=r"target must be a fraction of the operations in \(0, 1\), got 1.5"):
        narrow_control(cfg, out, target=1.5, shape=(8, 8))
    cfg.model.prune = dict(granularity="weight")
    with pytest.raises(ValueError, match="granularity 'weight'"):
        narrow_control(cfg, out, shape=(8, 8))


@pytest.mark.parametrize("name", ["config.py", "weights.pth"])
def test_files_of_another_network_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("model = dict(type='Mine')\n")
    with pytest.raises(ValueError, match=f"{name} exists and is no slimmed network's"):
        narrow_control(config(tmp_path), str(tmp_path / "mine"), shape=(8, 8))
    assert (tmp_path / "mine" / name).read_text() == "model = dict(type='Mine')\n"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = Path(__file__).parents[2] / "configs/cifar10/resnet20_cifar10_psi30_brief_short.py"
    assert not control.main([str(cfg), "--out", str(tmp_path / "c"), "--divisor", "1"])
    said = capsys.readouterr().out
    assert "MACs at 32x32: 40,551,040 -> 11,819,870 (0.2915)" in said
    with pytest.raises(SystemExit):
        control.main([str(cfg), "--out", str(tmp_path / "c"), "--divisor", "x"])
    assert "--divisor: must be 'auto' or a whole number of at least 1, got 'x'" in capsys.readouterr().err
