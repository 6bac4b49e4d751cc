"""mmpretrain's re-parameterised networks and mmcv's fusion of norms, masked and slimmed."""

from __future__ import annotations

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import mmitp  # noqa: F401
from mmitp.pruning import fold_norms, freeze_masks, randomize_masks, slim


def masked(backbone: dict, channels: int) -> nn.Module:
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    head = dict(type="LinearClsHead", num_classes=5, in_channels=channels)
    net = MODELS.build(
        dict(
            type="mmitp.MaskedModel",
            of="mmpretrain.ImageClassifier",
            backbone=backbone,
            neck=dict(type="GlobalAveragePooling"),
            head=head,
        )
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    randomize_masks(net, 0.6, torch.Generator().manual_seed(1))
    return freeze_masks(net.eval())


def logits(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x, mode="tensor")


REPVGG = dict(
    type="RepVGG",
    arch=dict(num_blocks=[1, 2, 1, 1], width_factor=[0.25, 0.25, 0.25, 0.25], group_layer_map=None, se_cfg=None),
)


def test_a_masked_repvgg_deploys_to_the_same_outputs() -> None:
    net, x = masked(REPVGG, 128), torch.randn(2, 3, 32, 32)
    expected = logits(net, x)
    net.backbone.switch_to_deploy()
    torch.testing.assert_close(logits(net, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_slimmed_repvgg_says_what_to_do_and_its_norms_fold() -> None:
    net, x = masked(REPVGG, 128), torch.randn(2, 3, 32, 32)
    example = dict(inputs=x, data_samples=None, mode="tensor")
    small = slim(net, example)
    with pytest.raises(ValueError, match=r"RepVGG.switch_to_deploy\(\) .* has been slimmed.*fold_norms"):
        small.backbone.switch_to_deploy()
    expected = logits(net, x)
    folded = fold_norms(small, example)
    torch.testing.assert_close(logits(folded, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("slimmed", [False, True])
def test_mmcvs_fusion_of_norms_keeps_the_outputs(slimmed: bool) -> None:
    backbone = dict(type="ResNet", depth=18, base_channels=8, stem_channels=8)
    net, x = masked(backbone, 64), torch.randn(2, 3, 32, 32)
    expected = logits(net, x)
    if slimmed:
        net = slim(net, dict(inputs=x, data_samples=None, mode="tensor"))
    fused = fuse_conv_bn(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    torch.testing.assert_close(logits(fused, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
