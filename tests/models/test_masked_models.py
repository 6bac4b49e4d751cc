"""Real networks through the whole core: budget, masks at random, slimming, against torch's own counter."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models import build_backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

import mmitp.models  # noqa: F401  registers types
from mmitp.engine.example import blank_example
from mmitp.models.config_text import config_text
from mmitp.models.masked import MaskedModel
from mmitp.models.slim_config import drop_pretrained, prune_hook_of, save_slim, slim_config
from mmitp.pruning import (
    MacBudget,
    MaskedConv2d,
    SlimPlan,
    apply_plan,
    fold_norms,
    mask_model,
    masked_layers,
    randomize_masks,
    share_masks,
)
from mmitp.pruning.slim import difference, slim_with_plan

BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": dict(type="mmpretrain.ResNet", depth=18, out_indices=(0, 1, 2, 3)),
    "resnet50": dict(type="mmpretrain.ResNet", depth=50),
    "vgg16": dict(type="mmpretrain.VGG", depth=16, norm_cfg=dict(type="BN")),
    "mobilenet_v2": dict(type="mmpretrain.MobileNetV2"),
    "resnext50": dict(type="mmpretrain.ResNeXt", depth=50, groups=32, width_per_group=4),
    "se_resnet50": dict(type="mmpretrain.SEResNet", depth=50),
    "shufflenet_v2": dict(type="mmpretrain.ShuffleNetV2"),
    "mobilenet_v3": dict(type="mmpretrain.MobileNetV3", arch="small"),
}


def flop_macs(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def prove(model: nn.Module, x: Tensor, keep: float = 0.6, share: bool = False) -> MacBudget:
    """Slimmed equals masked to 1e-5, its MACs the budget's, spec with state dict rebuild it, and its norms fold."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for value, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    model.eval()
    dense = copy.deepcopy(model)
    mask_model(model)
    if share:
        assert share_masks(model, x)
    budget = MacBudget(model, x)
    assert budget.unfollowed == {}
    assert budget.dense_macs == flop_macs(dense, x)
    randomize_masks(model, keep, generator)
    small, plan = slim_with_plan(model, x, budget)
    assert flop_macs(small, x) == budget.kept_macs() < 0.7 * budget.dense_macs
    assert difference(model, small, x, rtol=1e-5) == ""
    rebuilt = apply_plan(dense, SlimPlan.from_spec(plan.spec()))
    rebuilt.load_state_dict(small.state_dict())
    assert difference(small, rebuilt, x, rtol=0) == ""
    fold_norms(small, x)
    return budget


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_slim_exactly(name: str) -> None:
    torch.manual_seed(0)
    prove(build_backbone(BACKBONES[name]), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("variant", "share"), [("centernet_dla34", False), ("centernet_dla34_plain", False), ("centernet_dla34", True)]
)
def test_centernet_dla34_slims_exactly(variant: str, share: bool, models_dir: Path) -> None:
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(models_dir / f"{variant}.py").model)
    for name, parameter in model.named_parameters():
        if "conv_offset" in name:
            parameter.data.normal_(0, 0.05)  # zero by construction: sample between the pixels instead
    prove(model, torch.randn(1, 3, 64, 128), keep=0.7, share=share)


def test_shared_masks_leave_no_gather_inside_a_resnet() -> None:
    torch.manual_seed(0)
    model = mask_model(build_backbone(BACKBONES["resnet50"]))
    x = torch.randn(1, 3, 64, 64)
    share_masks(model, x)
    budget = MacBudget(model, x, check=False)
    randomize_masks(model, 0.6, torch.Generator().manual_seed(0))
    small, plan = slim_with_plan(model, x, budget)
    gathered = {name for name, cut in plan.layers.items() if cut.in_index is not None or cut.out_index is not None}
    # A stage's blocks read and write one stream; the last one's is the output, which stays whole: its readers gather.
    assert gathered == {"layer4.1.conv1", "layer4.2.conv1"}
    widths = {small.layer2[i].conv3.out_channels for i in range(4)} | {small.layer3[0].conv1.in_channels}
    assert len(widths) == 1
    assert widths.pop() < 512
    assert small.layer4[0].conv3.out_channels == 2048


def test_masked_model_builds_any_registered_type_with_masks_in_place() -> None:
    config = dict(type="mmitp.MaskedModel", of="mmpretrain.ResNet", depth=18, prune=dict(init=0.3, exclude="layer4"))
    model = MODELS.build(config)
    assert type(model).__name__ == "ResNet"
    assert not [name for name in masked_layers(model) if name.startswith("layer4")]
    assert model.layer1[0].conv1.prune_mask.unique().tolist() == pytest.approx([0.3])
    before = {k for k in MODELS.build(dict(type="mmpretrain.ResNet", depth=18)).state_dict()}
    assert {k for k in model.state_dict() if "prune_" not in k} == before


@MODELS.register_module()
class ScaledConvs(nn.Module):
    """Two stems, and a convolution of which only the weight is read."""

    def __init__(self, sizes: tuple[int, ...] = (64,)) -> None:
        super().__init__()
        self.sizes = sizes
        self.near, self.far = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.scaled, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Tensor:
        if inputs.shape[-1] not in self.sizes:
            raise ValueError(f"made for {self.sizes}")
        y = torch.cat([self.near(inputs), self.far(inputs.flip(-1))], 1).relu()
        return self.last(nn.functional.conv2d(y, self.scaled.weight * 0.1).relu())


@pytest.mark.parametrize("size", [64, 224, 96])
def test_masked_model_asks_a_forward_pass_what_can_carry_a_mask(size: int) -> None:
    model = MODELS.build(dict(type="mmitp.MaskedModel", of="ScaledConvs", sizes=(size,), prune=dict(shape=(64, 64))))
    if size == 96:  # runs at neither size that is tried: registration order it is, and the budget sees to the rest
        assert list(masked_layers(model)) == ["far", "scaled", "last"]
        assert list(dict(MacBudget(model, blank_example(model, (96, 96))).masked)) == ["last"]
        model = MODELS.build(dict(type="mmitp.MaskedModel", of="ScaledConvs", sizes=(96,), prune=dict(shape=(96, 96))))
    assert list(masked_layers(model)) == ["last"]


@pytest.mark.parametrize("size", [64, 224, 96])
def test_shared_masks_are_found_at_a_size_that_the_model_takes(size: int) -> None:
    config = dict(type="mmitp.MaskedModel", of="ScaledConvs", sizes=(size,), prune=dict(share="stream"))
    if size == 96:
        with pytest.raises(ValueError, match=r"64x64 .*made for \(96,\).*share='stream', shape=\(H, W\)"):
            MODELS.build(config)
    else:
        assert list(masked_layers(MODELS.build(config))) == ["last"]


def test_masked_model_leaves_the_random_numbers_of_the_initialisation_alone() -> None:
    torch.manual_seed(0)
    dense = MODELS.build(dict(type="mmpretrain.ResNet", depth=18))
    after = torch.rand(3)
    torch.manual_seed(0)
    model = MODELS.build(dict(type="mmitp.MaskedModel", of="mmpretrain.ResNet", depth=18))
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(model.conv1.weight, dense.conv1.weight)


def test_stages_frozen_by_training_mode_stay_dense() -> None:
    model = MODELS.build(dict(type="mmitp.MaskedModel", of="mmpretrain.MobileNetV2", frozen_stages=2))
    layers = masked_layers(model)
    assert layers
    assert not [name for name in layers if name.startswith(("layer1", "layer2"))]
    assert all(layer.prune_mask.requires_grad for layer in layers.values())


def test_masked_model_refuses_unknown_options() -> None:
    with pytest.raises(ValueError, match=r"unknown key\(s\) \['target'\]"):
        MaskedModel(of="mmpretrain.ResNet", depth=18, prune=dict(target=0.5))


def test_conv_cfg_road_masks_what_honours_it() -> None:
    model = build_backbone(dict(type="mmpretrain.MobileNetV2", conv_cfg=dict(type="mmitp.MaskedConv2d")))
    layers = masked_layers(model)
    assert all(type(m) is MaskedConv2d for m in layers.values())
    assert sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules()) == 17
    assert len(layers) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) - 17 - 1  # nor the stem


LAZY = """
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet

from mmitp.engine.hooks import PruneHook
from mmitp.models.masked import MaskedModel

model = dict(
    type={kind}, of=ImageClassifier, backbone=dict(type=ResNet, depth=18), neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=10, in_channels=512),
)
custom_hooks = [dict(type=PruneHook, target=0.5)]
"""


@pytest.mark.parametrize("kind", ["MaskedModel", "'mmitp.MaskedModel'"])
def test_configs_in_the_newer_style_give_a_slim_config_that_loads(kind: str, tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text(LAZY.format(kind=kind))
    cfg = Config.fromfile(tmp_path / "lazy.py")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(cfg.model)
    randomize_masks(model, 0.6, torch.Generator().manual_seed(0))
    small, plan = slim_with_plan(model, blank_example(model, (64, 64)))
    config, _ = save_slim(small, plan, cfg, str(tmp_path / "slim"), {})
    loaded = Config.fromfile(config)
    assert not loaded.custom_hooks
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        again = MODELS.build(loaded.model)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}


def test_a_slimmed_config_asks_for_no_pretrained_weights():
    backbone = dict(type="mmdet.ResNet", init_cfg=dict(type="Pretrained", checkpoint="dense.pth"))
    neck = dict(type="mmdet.FPN", pretrained="torchvision://resnet18")
    model = dict(type="mmitp.MaskedModel", of="mmdet.FCOS", pretrained="dense.pth", backbone=backbone, parts=[neck])
    out = slim_config(Config(dict(model=model)), SlimPlan()).model
    assert [out.pretrained, out.backbone.init_cfg, out.parts[0].pretrained] == [None, None, None]
    assert out.type == "mmitp.SlimModel"


def test_the_slimmed_config_reads_as_what_it_was_written_from(tmp_path: Path) -> None:
    more = dict(
        clip=dict(max_norm=math.inf, low=-math.inf, by=np.float64(0.1), many=np.int64(3)),
        data_root=Path("data") / "Größe 1",
        words={"class": 3, "it's": ["a", ("b",), ()], 7: {}},
        kind=dict(type=nn.GELU, dtype=float),
        long=[dict(name=f"part {i}", size=(i, i + 1)) for i in range(20)],
    )
    cfg = Config(dict(model=dict(type="mmitp.MaskedModel", of="mmdet.FCOS"), **copy.deepcopy(more)))
    (tmp_path / "config.py").write_text(config_text(slim_config(cfg, SlimPlan())), encoding="utf-8")
    read = Config.fromfile(tmp_path / "config.py").to_dict()
    more["data_root"] = "data/Größe 1"
    more["kind"]["type"] = "torch.nn.modules.activation.GELU"
    assert {key: read[key] for key in more} == more


def test_what_no_config_can_say_is_named_before_anything_is_written(tmp_path: Path) -> None:
    cfg = Config(dict(model=dict(type="mmitp.MaskedModel", of="mmdet.FCOS"), parts=[dict(kind=torch.float32)]))
    with pytest.raises(ValueError, match=r"parts\.0\.kind is torch\.float32"):
        save_slim(nn.Linear(1, 1), SlimPlan(), cfg, str(tmp_path / "slim"), {})
    assert not (tmp_path / "slim").exists()


def test_pretrained_weights_in_lists_and_of_timm_are_left_out_too() -> None:
    node = dict(
        init_cfg=[dict(type="Constant"), dict(type="Pretrained", checkpoint="x.pth")], neck=dict(pretrained=True)
    )
    drop_pretrained(node)
    assert node == dict(init_cfg=[dict(type="Constant")], neck=dict(pretrained=False))


def test_a_pruning_hook_among_the_default_hooks_is_one() -> None:
    hooks = dict(logger=dict(type="LoggerHook"), prune=dict(type="mmitp.PruneHook", target=0.5), timer=None)
    cfg = Config(dict(model=dict(type="mmitp.MaskedModel", of="mmdet.FCOS"), default_hooks=hooks))
    assert prune_hook_of(cfg).target == 0.5
    assert slim_config(cfg, SlimPlan()).default_hooks == dict(logger=dict(type="LoggerHook"), timer=None)


def test_a_slimmed_networks_work_folder_is_not_the_pruned_runs() -> None:
    model = dict(type="mmitp.MaskedModel", of="mmdet.FCOS")
    assert (
        slim_config(Config(dict(model=model, work_dir="work_dirs/run/")), SlimPlan()).work_dir == "work_dirs/run_slim"
    )
    assert "work_dir" not in slim_config(Config(dict(model=model)), SlimPlan())
