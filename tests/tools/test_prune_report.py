"""tools/prune_report.py on packaged configs of both libraries, and its exit code."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn

import mmitp.models.report as report_module
import mmitp.pruning.check as check_module
from mmitp.commands.prune_report import target_line
from mmitp.engine.config import load_config
from mmitp.models.report import build_masked, random_batch
from mmitp.pruning import MacBudget, mask_model, masked_layers

TOOL = Path(__file__).parents[2] / "tools" / "prune_report.py"
RESNET = "mmpretrain::resnet/resnet18_8xb32_in1k"
CENTERNET = "mmdet::centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location("prune_report", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def main(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prune_report.py", *args])
        return tool.main()

    return main


def test_report_lists_layers_and_reasons(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(RESNET, "--shape", "64", "64") == 0
    text = capsys.readouterr().out
    assert "ImageClassifier of mmpretrain::resnet/resnet18_8xb32_in1k at 64x64, batch 1" in text
    assert "stem: reads the image" in text
    assert "linear: masked only when asked for" in text
    assert "layers that can be pruned: 19 of 21" in text
    assert "dense MACs: 148,557,824 (0.149 G)" in text
    assert "cheapest reachable ratio: 0.00" in text
    assert "equal" not in text


@pytest.mark.parametrize("config", [RESNET, CENTERNET])
def test_check_passes_on_stock_configs(
    config: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, "--shape", "64", "64", "--check") == 0
    text = capsys.readouterr().out
    assert "slimmed outputs equal the masked ones: yes" in text
    assert "MACs at ratio 0.4" in text or "MACs at ratio 0.5000" in text
    assert text.endswith("passed\n")


PRUNED = """
_base_ = ["mmpretrain::resnet/resnet18_8xb16_cifar10.py"]
model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
custom_hooks = [dict(type="mmitp.PruneHook", target={target}, begin=1, end=2, input_shape=(32, 32))]
"""


@pytest.mark.parametrize(
    ("target", "says", "status"),
    [
        (0.5, "the config's own target 0.5 can be met", 0),
        (0.00001, "the config's own target 1e-05 cannot be reached", 1),
    ],
)
def test_it_says_whether_the_configs_own_target_can_be_met(
    target: float, says: str, status: int, run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "pruned.py").write_text(PRUNED.format(target=target))
    assert run(str(tmp_path / "pruned.py"), "--check") == status
    text = capsys.readouterr().out
    assert says in text
    assert "at 32x32, batch 1" in text  # PruneHook's


@pytest.mark.parametrize(
    ("cost", "target", "says", "met"),
    [
        ("params", 0.9, "target 0.9 can be met", True),
        # one of 8 channels of two layers leaves 3 + 1 + 1 * 4 + 4 of 68 parameters, and of 56 products 7
        (dict(type="params"), 0.17, "0.1765 of the parameters remain", False),
        (dict(type="macs"), 0.17, "target 0.17 can be met", True),
        (dict(type="latency", table="none.json"), 0.9, "is one of latency: the run looks at it", True),
    ],
)
def test_the_configs_own_target_is_one_of_its_own_cost(
    cost: Any, target: float, says: str, met: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    net, x = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))), torch.randn(1, 3, 5, 5)
    hook = dict(type="mmitp.PruneHook", target=target, cost=cost, min_keep=0.0)
    assert target_line(MacBudget(net, x), hook, lambda cost: MacBudget(net, x, cost=cost)) == met
    assert says in capsys.readouterr().out


SPARSE = """
_base_ = ["mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py"]
heads = _base_.model.roi_head
heads.update(num_stages=2, stage_loss_weights=[1, 1], bbox_head=heads.bbox_head[:2])
_base_.model.train_cfg.rcnn = _base_.model.train_cfg.rcnn[:2]
model = dict(backbone=dict(depth=18, init_cfg=None), neck=dict(in_channels=[64, 128, 256, 512]))
"""
DYHEAD = """
_base_ = ["mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py"]
neck = _base_.model.neck
neck[0].update(in_channels=[64, 128, 256, 512])
neck[1].update(num_blocks=1)
model = dict(backbone=dict(depth=18, init_cfg=None))
"""


@pytest.mark.parametrize(
    ("small", "dense"),
    [
        (SPARSE, "roi_head.bbox_head.1.instance_interactive_conv"),  # assigns in any forward pass
        (DYHEAD, "spatial_conv_low"),  # displacements of another pyramid level
    ],
    ids=["sparse_rcnn", "dyhead"],
)
def test_heads_with_demands_of_their_own_are_followed(
    small: str, dense: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(small)
    assert run(str(tmp_path / "small.py"), "--shape", "64", "64") == 0
    text = capsys.readouterr().out
    assert "cheapest reachable ratio: 0." in text
    assert dense in text


def test_steps_on_noise_do_not_depend_on_the_size_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 layers that triple the signal: a loss of 9^30, and no learning rate but a tiny one survives its gradient."""

    class Deep(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(30)])
            for layer in self.layers:
                layer.weight.data = 3 * torch.eye(4)
                layer.bias.data.zero_()

        def forward(self, inputs: torch.Tensor, mode: str = "tensor") -> dict:
            return dict(loss=self.layers(inputs).square().mean())

    monkeypatch.setattr(report_module, "random_batch", lambda *_: dict(inputs=torch.ones(2, 4)))
    model = Deep()
    losses = report_module.train_on_noise(model, (8, 8))
    assert losses[0] == pytest.approx(9.0**30, rel=1e-5)
    assert losses[0] > losses[1] > losses[2] > 0.5 * losses[0]
    assert all(layer.bias.abs().min() > 0 for layer in model.layers)  # a bias left at 0 would hide that it is lost

    def broken(*_: object) -> dict:
        return dict(inputs=torch.full((2, 4), float("nan")))

    monkeypatch.setattr(report_module, "random_batch", broken)
    with pytest.raises(RuntimeError, match="is not checked: its loss on noise is nan from its initial weights"):
        report_module.train_on_noise(model, (8, 8))


def test_a_small_step_is_a_thousandth_of_the_tensors_length() -> None:
    weight, bias, lost = (torch.nn.Parameter(t) for t in (torch.tensor([3.0, 4.0]), torch.zeros(4), torch.ones(2)))
    weight.grad, bias.grad, lost.grad = torch.tensor([1e30, 0.0]), torch.ones(4), torch.tensor([1.0, float("nan")])
    report_module.SmallSteps([weight, bias, lost]).step()
    torch.testing.assert_close(weight.data, torch.tensor([3.0 - 5e-3, 4.0]))
    torch.testing.assert_close(bias.data, torch.full((4,), -1e-3))
    assert lost.tolist() == [1, 1]


TASKS = """
_base_ = ["mmpretrain::resnet/resnet18_8xb16_cifar10.py"]
heads = dict(color=dict(type="LinearClsHead", num_classes=2), shape=dict(type="LinearClsHead", num_classes=7))
model = dict(
    backbone=dict(stem_channels=8, base_channels=8),
    head=dict(_delete_=True, type="MultiTaskHead", task_heads=heads, in_channels=64),
)
"""


def test_check_gives_every_task_of_a_multi_task_head_a_label(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    assert run(str(tmp_path / "tasks.py"), "--shape", "32", "32", "--linear", "--check") == 0
    assert capsys.readouterr().out.endswith("passed\n")
    model = build_masked(load_config(str(tmp_path / "tasks.py")))
    samples = random_batch(model, (32, 32), 40, torch.Generator().manual_seed(0))["data_samples"]
    assert {sample.color.gt_label.item() for sample in samples} == set(range(2))
    assert {sample.shape.gt_label.item() for sample in samples} == set(range(7))


def test_check_of_a_model_that_cannot_train_says_so(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("mmpretrain::levit/levit-128s_8xb256_in1k", "--check")  # its head is a distilled one
    output = capsys.readouterr()
    assert "dense MACs" in output.out
    assert "--check needs a training step" in output.err


def test_check_fails_where_the_counter_disagrees(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = check_module.counted_macs
    monkeypatch.setattr(check_module, "counted_macs", lambda *args: honest(*args) + 1)
    assert run(RESNET, "--shape", "32", "32", "--check") == 1
    assert capsys.readouterr().out.endswith("FAILED\n")


def test_check_fails_where_the_outputs_differ(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = check_module.slim_with_plan

    def broken(*args: object) -> object:
        small, plan = honest(*args)
        small.head.fc.weight.data[3] += 1e-3
        return small, plan

    monkeypatch.setattr(check_module, "slim_with_plan", broken)
    assert run(RESNET, "--shape", "32", "32", "--check") == 1
    assert "slimmed outputs equal the masked ones: no: output differs" in capsys.readouterr().out


class OwnBatches(BaseModel):
    """A network of a user's own, whose preprocessor leaves the images in a list."""

    def __init__(self, data_preprocessor: object = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, inputs: torch.Tensor, data_samples: object = None, mode: str = "tensor") -> object:
        x = self.b(self.a(inputs))
        return dict(loss=x.mean()) if mode == "loss" else x


def test_check_of_a_model_with_batches_of_its_own_says_so(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS._module_dict, "OwnBatches", OwnBatches)
    (tmp_path / "own.py").write_text("model = dict(type='OwnBatches')")
    with pytest.raises(SystemExit, match="2"):
        run(str(tmp_path / "own.py"), "--shape", "8", "8", "--check")
    assert "own.py: --check trains on random images" in capsys.readouterr().err


class Silent(OwnBatches):
    """It refuses to train without a word."""

    def forward(self, inputs: torch.Tensor, data_samples: object = None, mode: str = "tensor") -> object:
        if mode == "loss":
            raise AssertionError
        return super().forward(inputs, data_samples, mode)


def test_an_error_without_a_text_is_told_by_its_line(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS._module_dict, "Silent", Silent)
    (tmp_path / "own.py").write_text("model = dict(type='Silent')")
    with pytest.raises(SystemExit, match="2"):
        run(str(tmp_path / "own.py"), "--shape", "8", "8", "--check")
    said = capsys.readouterr().err
    assert "Silent does not: AssertionError: raise AssertionError in forward of " in said
    assert "test_prune_report.py" in said


def test_a_slimmed_networks_config_is_called_one(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slim = "dict(layers=dict(), norms=dict(), pads=dict())"
    (tmp_path / "config.py").write_text(f"model = dict(type='mmitp.SlimModel', of='mmdet.FCOS', slim={slim})")
    with pytest.raises(SystemExit, match="2"):
        run(str(tmp_path / "config.py"))
    said = capsys.readouterr().err
    assert "config.py: this is a slimmed network's config" in said
    assert "--linear" not in said


def test_building_never_asks_for_pretrained_weights() -> None:
    cfg = load_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco")
    assert cfg.model.backbone.init_cfg.type == "Pretrained"
    model = build_masked(cfg)
    assert "Pretrained" not in str([getattr(m, "init_cfg", None) for m in model.modules()])
    assert masked_layers(model)
    assert cfg.model.backbone.init_cfg.type == "Pretrained"  # the config itself is untouched


def test_random_batches_carry_valid_labels() -> None:
    model = build_masked(load_config(CENTERNET))
    batch = random_batch(model, (64, 96), 2, torch.Generator().manual_seed(0))
    assert [tuple(x.shape) for x in batch["inputs"]] == [(3, 64, 96)] * 2
    for sample in batch["data_samples"]:
        boxes = sample.gt_instances.bboxes.tensor
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= 96).all()
        assert (boxes[:, 3] <= 64).all()
        assert (sample.gt_instances.labels < 80).all()
    labels = random_batch(build_masked(load_config(RESNET)), (32, 32), 8, torch.Generator().manual_seed(0))
    assert all(0 <= s.gt_label.item() < 1000 for s in labels["data_samples"])
