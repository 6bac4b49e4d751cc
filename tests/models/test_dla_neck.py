"""CenterNet's up-sampling neck: names, shapes, bilinear start."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmitp.models.dla_neck import DLAUp, bilinear_upsampling
from mmitp.registry import MODELS

CHANNELS = (16, 32, 64, 128)


def levels(height: int = 64, width: int = 96, batch: int = 1) -> list[torch.Tensor]:
    return [torch.rand(batch, c, height >> i, width >> i) for i, c in enumerate(CHANNELS, start=2)]


@pytest.mark.parametrize("use_dcn", [False, True])
def test_one_map_at_stride_four(use_dcn: bool):
    neck = MODELS.build(dict(type="mmitp.DLAUp", in_channels=CHANNELS, use_dcn=use_dcn))
    inputs = levels()
    copies = [x.clone() for x in inputs]
    outputs = neck(inputs)
    assert isinstance(outputs, tuple)
    assert [tuple(x.shape) for x in outputs] == [(1, 16, 16, 24)]
    assert len(inputs) == 4
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("use_dcn", [False, True])
def test_every_parameter_is_trained(use_dcn: bool):
    neck = DLAUp(CHANNELS, use_dcn=use_dcn)
    neck(levels(batch=2))[0].square().sum().backward()
    assert [name for name, parameter in neck.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("use_dcn", [False, True])
def test_stages_connect_the_published_channels(use_dcn: bool):
    """Output and input channels of each projection: 512 -> 256; twice 256 -> 128; three times 128 -> 64; then to 64."""
    state = DLAUp(use_dcn=use_dcn).state_dict()
    weights = {key: tuple(value.shape) for key, value in state.items() if key.endswith("conv.weight")}
    expected = {}
    stages = [("dla_up.ida_0", 256, [512]), ("dla_up.ida_1", 128, [256] * 2), ("dla_up.ida_2", 64, [128] * 3)]
    for name, out_channels, in_channels in [*stages, ("ida_up", 64, [128, 256])]:
        for i, channels in enumerate(in_channels, start=1):
            expected[f"{name}.proj_{i}.conv.weight"] = (out_channels, channels, 3, 3)
            expected[f"{name}.node_{i}.conv.weight"] = (out_channels, out_channels, 3, 3)
    assert weights == expected
    assert [tuple(state[f"ida_up.up_{i}.weight"].shape) for i in (1, 2)] == [(64, 1, 4, 4), (64, 1, 8, 8)]
    assert ("ida_up.node_1.conv.conv_offset.weight" in state) is use_dcn
    assert "ida_up.node_1.actf.0.running_mean" in state


def test_deformable_start_is_half_the_plain_convolution():
    """Zero offsets, a mask of sigmoid(0) = 1/2 and a zero bias."""
    neck = DLAUp(CHANNELS, use_dcn=True)
    convolution = neck.ida_up.node_1.conv
    assert not convolution.conv_offset.weight.any()
    assert not convolution.conv_offset.bias.any()
    assert tuple(convolution.conv_offset.weight.shape) == (27, 16, 3, 3)
    x = torch.rand(1, 16, 5, 7)
    plain = functional.conv2d(x, convolution.weight, padding=1)
    torch.testing.assert_close(convolution(x), plain / 2)


@pytest.mark.parametrize("factor", [2, 4])
def test_upsampling_starts_bilinear(factor: int):
    layer = bilinear_upsampling(3, factor)
    assert isinstance(layer, nn.ConvTranspose2d)
    x = torch.rand(1, 3, 6, 7)
    expected = functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    # At the border the transposed convolution meets zeros where interpolation repeats the edge.
    inner = (..., slice(factor, -factor), slice(factor, -factor))
    torch.testing.assert_close(layer(x)[inner], expected[inner])
    assert layer(x).shape == expected.shape
