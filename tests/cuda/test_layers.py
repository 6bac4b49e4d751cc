"""Masked layers and the deformable convolution on the device: forward, backward, in three precisions."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from twins import TOLERANCE, compare, gradients, on_both

from mmitp.ops import modulated_deform_conv2d
from mmitp.pruning import MacBudget, freeze_masks, mask_model, randomize_masks, slim

DTYPES = list(TOLERANCE)


def net(granularity: str = "channel") -> nn.Module:
    layers = [
        *(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2)),
        *(nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 6)),
    ]
    model = mask_model(nn.Sequential(*layers), granularity=granularity, linear=True)
    randomize_masks(model, 0.6, torch.Generator().manual_seed(0))
    return model


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 4, 14, 18, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_masked_layers(device: torch.device, granularity: str, dtype: torch.dtype) -> None:
    on_both(net(granularity).eval(), (images(),), device, dtype, lambda model, x: model(x))


def test_masked_layers_in_channels_last_and_in_training_mode(device: torch.device) -> None:
    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model.to(memory_format=torch.channels_last)
        return model(x.contiguous(memory_format=torch.channels_last))

    on_both(net().train(), (images(),), device, torch.float32, run)


def test_frozen_and_slimmed_networks(device: torch.device) -> None:
    model = net().eval()
    budget = MacBudget(model, images(1))
    freeze_masks(model, budget.split(budget.flat_pattern()))
    small = slim(model, images(1), budget)
    on_both(model, (images(),), device, torch.float32, lambda m, x: m(x))
    on_both(small, (images(),), device, torch.float32, lambda m, x: m(x))
    there = copy.deepcopy(model).to(device)
    small_there = slim(there, images(1).to(device), MacBudget(there, images(1).to(device)))
    assert {k: v.shape for k, v in small_there.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }
    with torch.no_grad():
        compare({"output": small(images())}, {"output": small_there(images().to(device))})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "deform_groups", "stride"), [(1, 1, 1), (2, 2, 2)])
def test_deformable_convolution(
    device: torch.device, groups: int, deform_groups: int, stride: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    h, w = (9, 11) if stride == 1 else (5, 6)
    x, weight, bias = draw(2, 8, 9, 11), draw(6, 8 // groups, 3, 3), draw(6)
    offset, mask = draw(2, 18 * deform_groups, h, w), draw(2, 9 * deform_groups, h, w)
    offset = offset.floor() + 0.1 + 0.8 * (offset - offset.floor())  # no kinks
    given, results = (x, offset, mask, weight, bias), []
    for place in ("cpu", device):
        tensors = {n: t.to(place, copy=True).requires_grad_() for n, t in zip("xomwb", given, strict=True)}
        tx, to, tm, tw, tb = tensors.values()
        options = dict(stride=stride, padding=1, groups=groups, deform_groups=deform_groups)
        out = modulated_deform_conv2d(tx, to, tm, tw, tb, **options)
        results.append(gradients(out, tensors))
    compare(*results)
    if dtype != torch.float32:  # it runs in single precision by design
        with torch.autocast(device.type, dtype):
            arguments = [t.detach().to(device) for t in (x.to(dtype), offset, mask, weight, bias)]
            out = modulated_deform_conv2d(*arguments, **options)
        compare({"output": results[0]["output"]}, {"output": out}, dtype)


def test_the_masked_network_compiles_in_one_graph(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("the CPU's compiler takes long")
    model = net().eval().to(device)
    compiled = torch.compile(model, fullgraph=True)
    x = images().to(device)
    with torch.no_grad():
        compare({"output": model(x)}, {"output": compiled(x)})
