"""ResNetCifar: shapes, counted parameters and multiplications, the option-A shortcut, the key map, converted files."""

import pytest
import torch
from torch import nn

from mmitp.models.resnet_cifar import ResNetCifar, ShortcutA, convert_resnet_cifar, convert_resnet_cifar_file
from mmitp.pruning import SlimPlan, apply_plan, mask_model, masked_layers, slim


def conv_macs(model: nn.Module, size: int) -> int:
    """Multiplications of every convolution in one forward pass over a size x size image."""
    total = 0

    def count(module: nn.Conv2d, _, out: torch.Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * out.shape[2] * out.shape[3]

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return total


# ResNet-20, n = 3. Convolutions 3*16*9 = 432; stage 1: 6 * 16*16*9 = 13,824; stage 2: 16*32*9 + 5 * 32*32*9 = 50,688;
# stage 3: 32*64*9 + 5 * 64*64*9 = 202,752. Norms 2 * (7*16 + 6*32 + 6*64) = 1,376. Classifier 650. Sum 269,722.
# Multiplications: 432 * 1024 + 13,824 * 1024 + 50,688 * 256 + 202,752 * 64 = 40,550,400.
# ResNet-56, n = 9, likewise: 848,304 + 4,064 + 650 = 853,018 and 125,485,056.
@pytest.mark.parametrize(("depth", "parameters", "macs"), [(20, 269_722, 40_550_400), (56, 853_018, 125_485_056)])
def test_parameters_and_macs_are_those_derived_by_hand(depth: int, parameters: int, macs: int) -> None:
    model = ResNetCifar(depth)
    classifier = 64 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) + classifier == parameters
    assert conv_macs(model, 32) == macs


def test_projection_shortcut_adds_two_convolutions_with_norms() -> None:
    plain, projected = (sum(p.numel() for p in ResNetCifar(20, shortcut=s).parameters()) for s in "AB")
    assert projected - plain == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert conv_macs(ResNetCifar(20, shortcut="B"), 32) - 40_550_400 == 16 * 32 * 256 + 32 * 64 * 64


@pytest.mark.parametrize("depth", [8, 20, 32, 44, 56, 110])
def test_depth_counts_the_weighted_layers(depth: int) -> None:
    convolutions = [m for m in ResNetCifar(depth, base_channels=2).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == depth


# (9, 17, 34): convolutions 9 * (3*9 + 6*81) = 4,617 at 1024 places; 9 * (9*17 + 5*289) = 14,382 at 256;
# 9 * (17*34 + 5*1156) = 57,222 at 64.
def test_stage_widths_can_be_given_one_by_one() -> None:
    model = ResNetCifar(20, base_channels=(9, 17, 34))
    assert conv_macs(model, 32) == 4_617 * 1024 + 14_382 * 256 + 57_222 * 64
    assert model(torch.zeros(2, 3, 32, 32))[0].shape == (2, 34, 8, 8)
    shortcut = model.layer2[0].shortcut(torch.ones(1, 9, 4, 4))  # 8 new channels, half of them in front
    assert shortcut[0, :, 0, 0].tolist() == [0] * 4 + [1] * 9 + [0] * 4
    twice = [[p.shape for p in ResNetCifar(8, base_channels=w).parameters()] for w in (4, (4, 8, 16))]
    assert twice[0] == twice[1]
    ResNetCifar(8, shortcut="B", base_channels=(8, 4, 16))(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("widths", [(16, 32), (16, 32, 64, 128), (32, 16, 64), (0, 8, 16)])
def test_stage_widths_that_are_not_three_or_shrink_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="use one number of channels or those of three stages"):
        ResNetCifar(8, base_channels=widths)


@pytest.mark.parametrize(("size", "out"), [(32, 8), (33, 9), (64, 16)])
def test_output_is_a_quarter_of_the_image_rounded_up(size: int, out: int) -> None:
    features = ResNetCifar(8)(torch.zeros(2, 3, size, size))
    assert isinstance(features, tuple)
    assert [f.shape for f in features] == [(2, 64, out, out)]


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradients", [True, False])
def test_training_runs_channels_last_and_inference_in_the_layout_given(given, gradients: bool) -> None:
    layouts = []
    model = ResNetCifar(20).eval()
    model.layer1[0].conv2.register_forward_hook(
        lambda m, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    with torch.set_grad_enabled(gradients):
        model(torch.randn(2, 3, 8, 8).contiguous(memory_format=given))
    assert layouts == [gradients or given is torch.channels_last]


@pytest.mark.parametrize("kwargs", [{"depth": 18}, {"depth": 2}, {"shortcut": "C"}])
def test_unknown_variants_are_refused(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="use "):
        ResNetCifar(**kwargs)


def test_shortcut_a_subsamples_and_centres_the_channels() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4) + 1
    y = ShortcutA(2, 4, stride=2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.fc = ResNetCifar(8), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.net(x)[0].mean((2, 3)))


def test_a_stream_sheds_channels_through_shortcut_a() -> None:
    """Stage 3's only reader, the classifier, drops two zeros in front, a channel passed on and the last zero.

    The one passed on, 20, is stage 2's channel 4, which the last block reads: it stays in the stream.
    """
    net = Classifier().eval()
    x = torch.randn(2, 3, 8, 8)
    mask_model(net, linear=True)
    with torch.no_grad():
        masked_layers(net)["fc"].prune_mask[[0, 1, 20, 63]] = -1.0
    small = slim(net, x)
    two, three = (stage[0].shortcut for stage in (small.net.layer2, small.net.layer3))
    assert (two.front, two.in_channels, two.out_channels) == (8, 16, 32)
    assert (three.front, three.in_channels, three.out_channels) == (14, 32, 14 + 32 + 15)
    assert small.net.layer3[0].bn2.num_features == 61
    assert torch.allclose(small(x), net(x), atol=1e-6)


@pytest.mark.parametrize(("name", "pad"), [("net.layer3.0.shortcut", [16, 33, 16]), ("net.bn1", [8, 16, 8])])
def test_a_spec_of_another_shortcut_is_refused_by_name(name: str, pad: list[int]) -> None:
    plan = SlimPlan.from_spec(dict(layers={}, norms={}, pads={name: pad}))
    with pytest.raises(ValueError, match=f"{name}.*made from another model"):
        apply_plan(Classifier(), plan)


def test_zeros_may_all_come_after_the_channels() -> None:
    x = torch.ones(1, 2, 2, 2)
    assert ShortcutA(2, 4, 1, front=0)(x)[0, :, 0, 0].tolist() == [1, 1, 0, 0]
    assert ShortcutA(2, 3, 1)(x)[0, :, 0, 0].tolist() == [1, 1, 0]  # half of one, rounded down


@pytest.mark.parametrize("kwargs", [{"front": 3}, {"front": -1}])
def test_shortcut_a_refuses_zeros_that_do_not_fit(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="must hold every input channel"):
        ShortcutA(2, 4, 1, **kwargs)


def reference_layout(model: ResNetCifar, prefix: str) -> dict[str, torch.Tensor]:
    """Generated weights under the keys of the public checkpoints."""
    state = {f"{prefix}{k}": v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    return state | {f"{prefix}linear.weight": torch.randn(10, 64), f"{prefix}linear.bias": torch.randn(10)}


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_key_map_renames_every_entry_and_keeps_the_values(prefix: str) -> None:
    source = ResNetCifar(8)
    state = reference_layout(source, prefix)
    converted = convert_resnet_cifar({"state_dict": state, "best_prec1": 90.0})
    assert len(converted) == len(state)
    assert torch.equal(converted["head.fc.weight"], state[f"{prefix}linear.weight"])
    assert torch.equal(converted["head.fc.bias"], state[f"{prefix}linear.bias"])
    target = ResNetCifar(8)
    backbone = {k.removeprefix("backbone."): v for k, v in converted.items() if k.startswith("backbone.")}
    missing, unexpected = target.load_state_dict(backbone, strict=False)
    assert not unexpected
    assert all(k.endswith("num_batches_tracked") for k in missing)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(target.eval()(x)[0], source.eval()(x)[0])


def test_a_foreign_checkpoint_is_refused_by_the_name_of_its_key() -> None:
    with pytest.raises(ValueError, match=r"layer4\.0\.conv1\.weight"):
        convert_resnet_cifar({"layer4.0.conv1.weight": torch.zeros(1)})


def test_file_conversion_writes_a_loadable_checkpoint(tmp_path) -> None:
    state = reference_layout(ResNetCifar(8), "module.")
    torch.save({"state_dict": state, "best_prec1": 91.0}, tmp_path / "in.th")
    convert_resnet_cifar_file(str(tmp_path / "in.th"), str(tmp_path / "out.pth"))
    written = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert torch.equal(written["backbone.conv1.weight"], state["module.conv1.weight"])


def test_a_checkpoint_is_not_written_over_by_its_conversion(tmp_path) -> None:
    torch.save(reference_layout(ResNetCifar(8), ""), tmp_path / "in.th")
    before = (tmp_path / "in.th").read_bytes()
    with pytest.raises(ValueError, match=r"in\.th is the input .*give another name"):
        convert_resnet_cifar_file(str(tmp_path / "in.th"), str(tmp_path / "." / "in.th"))
    assert (tmp_path / "in.th").read_bytes() == before


def test_initialisation_is_he_normal_over_the_fan_in() -> None:
    torch.manual_seed(0)
    model = ResNetCifar(20)
    model.init_weights()
    weight = model.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
