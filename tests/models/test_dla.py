"""DLA-34: names and sizes of the published network, its dead projections, pretrained weights."""

import logging

import pytest
import torch
from torch import nn

import mmitp  # noqa: F401
from mmitp.models.dla import DLA
from mmitp.pruning import MaskedConv2d
from mmitp.registry import MODELS

CHANNELS = (16, 32, 64, 128, 256, 512)
DEAD = ("level3.project.", "level4.project.")


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the ImageNet checkpoint, from the paper's description of the network (counters left out)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_bn(conv: str, norm: str, out_channels: int, in_channels: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (out_channels, in_channels, kernel, kernel)
        for field in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{field}"] = (out_channels,)

    def block(name: str, out_channels: int, in_channels: int) -> None:
        conv_bn(f"{name}.conv1", f"{name}.bn1", out_channels, in_channels, 3)
        conv_bn(f"{name}.conv2", f"{name}.bn2", out_channels, out_channels, 3)

    def tree(name: str, out_channels: int, in_channels: int, root: int) -> None:
        block(f"{name}.tree1", out_channels, in_channels)
        block(f"{name}.tree2", out_channels, out_channels)
        conv_bn(f"{name}.root.conv", f"{name}.root.bn", out_channels, root, 1)
        if in_channels != out_channels:
            conv_bn(f"{name}.project.0", f"{name}.project.1", out_channels, in_channels, 1)

    conv_bn("base_layer.0", "base_layer.1", 16, 3, 7)
    conv_bn("level0.0", "level0.1", 16, 16, 3)
    conv_bn("level1.0", "level1.1", 32, 16, 3)
    tree("level2", 64, 32, root=128)
    for level, out_channels, in_channels, roots in ((3, 128, 64, (256, 448)), (4, 256, 128, (512, 896))):
        tree(f"level{level}.tree1", out_channels, in_channels, roots[0])
        tree(f"level{level}.tree2", out_channels, out_channels, roots[1])
        conv_bn(f"level{level}.project.0", f"level{level}.project.1", out_channels, in_channels, 1)
    tree("level5", 512, 256, root=1280)
    shapes["fc.weight"] = (1000, 512, 1, 1)
    shapes["fc.bias"] = (1000,)
    return shapes


@pytest.fixture(scope="module")
def imagenet_checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(shape, generator=generator) for key, shape in published_shapes().items()}


def test_full_width_has_the_published_keys_shapes_and_count():
    model = DLA()
    own = {key: tuple(value.shape) for key, value in model.state_dict().items() if "num_batches" not in key}
    published = {key: shape for key, shape in published_shapes().items() if not key.startswith("fc.")}
    assert own == published
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_270_832


def test_channels_can_be_given_level_by_level():
    channels = (3, 6, 11, 22, 44, 89)
    outputs = DLA(channels=channels, out_indices=range(6))(torch.zeros(1, 3, 64, 96))
    assert tuple(output.shape[1] for output in outputs) == channels


@pytest.mark.parametrize("width", [0.25, 0.5])
def test_levels_have_stride_and_scaled_channels(width: float):
    model = MODELS.build(dict(type="mmitp.DLA", width=width, out_indices=range(6)))
    outputs = model(torch.zeros(1, 3, 64, 96))
    assert [tuple(output.shape) for output in outputs] == [
        (1, int(channels * width), 64 // 2**level, 96 // 2**level) for level, channels in enumerate(CHANNELS)
    ]
    assert [output.shape for output in DLA(width=width)(torch.zeros(1, 3, 64, 96))] == [
        output.shape for output in outputs[2:]
    ]


def test_only_the_dead_projections_are_frozen_and_without_gradient():
    model = DLA(width=0.25)
    sum(output.sum() for output in model(torch.rand(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        dead = name.startswith(DEAD)
        assert parameter.requires_grad is not dead, name
        assert (parameter.grad is None) is dead, name


@pytest.mark.parametrize(
    ("name", "matters"), [("level2", True), ("level3", False), ("level4", False), ("level5", True)]
)
def test_projections_that_matter(name: str, matters: bool):
    torch.manual_seed(0)
    model = DLA(width=0.25).eval()
    image = torch.rand(1, 3, 64, 64)
    runs = []
    project = getattr(model, name).project
    project.register_forward_hook(lambda *_: runs.append(name))
    with torch.no_grad():
        before = model(image)[-1]
        project[0].weight.mul_(2)
        after = model(image)[-1]
    assert runs == [name, name]
    assert torch.equal(before, after) is not matters


def test_distributed_training_waits_for_no_dead_parameter(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(DLA(width=0.25, out_indices=(5,)))
        for _ in range(2):  # the second forward pass raises if the first left a parameter waiting
            model(torch.rand(2, 3, 32, 32))[0].sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_random_weights_follow_the_fan_out():
    torch.manual_seed(0)
    model = DLA(width=0.5)
    model.init_weights()
    for convolution in (model.level4.tree2.tree2.conv1, model.level5.root.conv):
        out_channels, _, height, width = convolution.weight.shape
        expected = (2 / (height * width * out_channels)) ** 0.5
        assert convolution.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(convolution.weight.mean().item()) < expected / 50


def wrapped(checkpoint: dict[str, torch.Tensor], style: str) -> dict:
    if style == "imagenet":
        return checkpoint
    state = {f"module.base.{key}": value for key, value in checkpoint.items()}
    return {"epoch": 140, "state_dict": {**state, "module.hm.0.weight": torch.zeros(1)}}


@pytest.mark.parametrize("style", ["imagenet", "centernet"])
def test_pretrained_weights_load(imagenet_checkpoint, tmp_path, style: str):
    path = tmp_path / "dla34.pth"
    torch.save(wrapped(imagenet_checkpoint, style), path)
    model = DLA(init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    assert not torch.equal(model.level5.root.conv.weight, imagenet_checkpoint["level5.root.conv.weight"])
    model.init_weights()
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, imagenet_checkpoint[key]), key


def test_missing_pretrained_file_leaves_random_weights_and_says_so(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(
        "mmitp.models.dla.print_log", lambda message, **kwargs: messages.append((message, kwargs["level"]))
    )
    path = tmp_path / "absent.pth"
    model = DLA(width=0.25, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    model.init_weights()
    assert [level for _, level in messages] == [logging.WARNING]
    assert str(path) in messages[0][0]
    assert model.level5.root.conv.weight.std() > 0


def test_unfitting_checkpoints_are_refused_by_name(imagenet_checkpoint, tmp_path):
    path = tmp_path / "dla34.pth"
    torch.save(imagenet_checkpoint, path)
    with pytest.raises(ValueError, match="width=1"):
        DLA(width=0.5, init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights()
    torch.save({key: value for key, value in imagenet_checkpoint.items() if not key.startswith("level4")}, path)
    with pytest.raises(ValueError, match=r"has no 'level4\."):
        DLA(init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights()


def test_convolutions_come_from_conv_cfg_and_take_pretrained_weights(imagenet_checkpoint, tmp_path):
    path = tmp_path / "dla34.pth"
    torch.save(imagenet_checkpoint, path)
    model = DLA(conv_cfg=dict(type="mmitp.MaskedConv2d"), init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == sum(len(shape) == 4 for shape in published_shapes().values()) - 1  # without fc
    assert [type(layer) for layer in convolutions] == [nn.Conv2d] + [MaskedConv2d] * (len(convolutions) - 1)  # the stem
    model.init_weights()
    assert torch.equal(model.level5.root.conv.weight, imagenet_checkpoint["level5.root.conv.weight"])
    dead = [p for name, p in model.named_parameters() if name.startswith(DEAD)]
    assert len(dead) == 2 * 4
    assert not any(parameter.requires_grad for parameter in dead)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depth=50), "depth must be one of"),
        (dict(width=0.3), "whole positive numbers"),
        (dict(width=0.03125), "whole positive numbers"),
        (dict(channels=(3, 6, 11)), "6 positive numbers, one a level"),
        (dict(channels=(3, 6, 11, 22, 44, 0)), "6 positive numbers, one a level"),
        (dict(width=0.25, channels=(3, 6, 11, 22, 44, 89)), "width stays 1"),
        (dict(out_indices=(2, 6)), "levels from 0 to 5"),
        (dict(out_indices=()), "levels from 0 to 5"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DLA(**arguments)
