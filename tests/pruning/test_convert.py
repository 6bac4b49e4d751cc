"""What gets a mask, what does not, and that nothing else about the model changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mmitp.pruning import (
    MacBudget,
    MaskedConv2d,
    MaskedConvTranspose2d,
    MaskedLinear,
    fold_masks,
    mask_model,
    masked_layers,
)
from mmitp.pruning.layers import randomize_masks


class Custom(nn.Conv2d):
    """Computes something else under the name of a convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(1)


def zoo() -> nn.ModuleDict:
    return nn.ModuleDict(
        dict(
            stem=nn.Conv2d(3, 8, 3),
            plain=nn.Conv2d(8, 8, 1),
            depthwise=nn.Conv2d(8, 8, 3, groups=8),
            grouped=nn.Conv2d(8, 8, 3, groups=2),
            transposed=nn.ConvTranspose2d(8, 4, 2),
            transposed_depthwise=nn.ConvTranspose2d(8, 8, 2, groups=8),
            custom=Custom(8, 8, 1),
            other=nn.Conv1d(8, 8, 1),
            block=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
            fc=nn.Linear(8, 2),
        )
    )


def test_plain_and_transposed_convolutions_get_masks_and_nothing_else() -> None:
    model = zoo()
    assert mask_model(model) is model
    assert {n: type(m) for n, m in masked_layers(model).items()} == {
        "plain": MaskedConv2d,
        "transposed": MaskedConvTranspose2d,
        "block.0": MaskedConv2d,
    }
    assert {n: tuple(m.prune_mask.shape) for n, m in masked_layers(model).items()} == {
        "plain": (8,),
        "transposed": (8,),
        "block.0": (8,),
    }


def test_linear_and_stem_join_when_asked() -> None:
    assert type(mask_model(zoo(), linear=True)["fc"]) is MaskedLinear
    assert type(mask_model(zoo(), include=["fc", "plain"])["fc"]) is MaskedLinear
    assert type(mask_model(zoo(), include=["stem"])["stem"]) is MaskedConv2d
    assert list(masked_layers(mask_model(zoo(), include="*"))) == ["plain", "transposed", "block.0"]


def test_a_first_convolution_that_reads_features_is_no_stem() -> None:
    assert list(masked_layers(mask_model(nn.Sequential(nn.Conv2d(8, 4, 1))))) == ["0"]


def test_include_and_exclude_take_globs_and_subtrees() -> None:
    assert list(masked_layers(mask_model(zoo(), include="block"))) == ["block.0"]
    assert list(masked_layers(mask_model(zoo(), include=["pl*", "block"]))) == ["plain", "block.0"]
    assert list(masked_layers(mask_model(zoo(), exclude=["block", "trans*"]))) == ["plain"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(include="nowhere"), "'nowhere' matches no module"),
        (dict(exclude=["plain", "Block"]), "'Block' matches no module"),
        (dict(include="depthwise"), "no layer of ModuleDict to mask"),
        (dict(granularity="filter"), "granularity must be one of"),
    ],
)
def test_options_that_do_nothing_are_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_model(zoo(), **options)


def test_masking_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="already carries masks"):
        mask_model(mask_model(zoo()))


def test_a_refused_conversion_leaves_the_model_alone() -> None:
    model = zoo()
    with pytest.raises(ValueError, match="matches no module"):
        mask_model(model, include=["plain", "nowhere"])
    assert not masked_layers(model)


def test_parameters_keys_hooks_and_attributes_stay() -> None:
    model = zoo()
    seen: list[nn.Module] = []
    model["plain"].register_forward_hook(lambda m, *_: seen.append(m))
    model["plain"].remark = "kept"
    parameters, layer, keys = dict(model.named_parameters()), model["plain"], list(model.state_dict())
    mask_model(model)
    assert model["plain"] is layer
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert [k for k in model.state_dict() if "prune" not in k] == keys
    layer(torch.randn(1, 8, 4, 4))
    assert seen == [layer]
    assert layer.remark == "kept"
    fold_masks(model)
    assert model["plain"] is layer
    assert list(model.state_dict()) == keys
    assert not [name for name in vars(layer) if "mask" in name or name == "dense_type"]


def test_a_shared_module_has_one_mask_everywhere() -> None:
    conv = nn.Conv2d(8, 8, 1)
    model = mask_model(nn.ModuleDict(dict(a=nn.Sequential(conv), b=nn.Sequential(conv))))
    assert model["a"][0] is model["b"][0]
    assert type(model["b"][0]) is MaskedConv2d
    assert list(masked_layers(model)) == ["a.0"]


def test_tied_weights_stay_dense() -> None:
    model = zoo()
    model["block"][0].weight = model["plain"].weight
    assert list(masked_layers(mask_model(model))) == ["transposed"]


def test_weights_computed_by_hooks_stay_dense() -> None:
    model = zoo()
    model["plain"] = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
    prune.random_unstructured(model["block"][0], "weight", amount=0.5)
    assert list(masked_layers(mask_model(model))) == ["transposed"]


def test_a_lazy_layer_needs_its_weights_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(8, 3), nn.LazyConv2d(4, 1))
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="lazy layer '1' has no weights yet: run the model once"):
        mask_model(model, example_inputs=x)
    model(x)
    assert set(masked_layers(mask_model(model, example_inputs=x))) == {"2", "3"}


def test_init_dtype_and_device_follow_the_options_and_the_weight() -> None:
    model = mask_model(zoo().double(), init=0.3)
    mask = model["plain"].prune_mask
    assert mask.dtype == torch.float32
    assert mask.unique().tolist() == pytest.approx([0.3])
    assert model["plain"](torch.randn(1, 8, 2, 2, dtype=torch.double)).dtype == torch.double


def test_randomize_keeps_about_the_fraction_asked_for() -> None:
    model = mask_model(nn.Sequential(nn.Conv2d(1000, 1, 1)))
    randomize_masks(model, 0.3, torch.Generator().manual_seed(0))
    assert masked_layers(model)["0"].binary_mask().mean().item() == pytest.approx(0.3, abs=0.05)


def test_mmengine_initialises_masked_convolutions_like_dense_ones() -> None:
    pytest.importorskip("mmengine")
    from mmcv.cnn import build_conv_layer
    from mmengine.model import BaseModule, constant_init, kaiming_init

    import mmitp.models  # noqa: F401  registers the type

    class Block(BaseModule):
        def __init__(self) -> None:
            super().__init__(init_cfg=dict(type="Constant", layer="Conv2d", val=0.25, bias=0.5))
            self.conv = build_conv_layer(dict(type="mmitp.MaskedConv2d"), 8, 4, 1)
            self.depthwise = build_conv_layer(dict(type="mmitp.MaskedConv2d"), 8, 8, 3, groups=8)

    block = Block()
    assert type(block.conv) is MaskedConv2d
    assert type(block.depthwise) is nn.Conv2d  # a group carries no mask of its own
    block.init_weights()
    for layer in (block.conv, block.depthwise):
        assert layer.weight.unique().tolist() == [0.25]
        assert layer.bias.unique().tolist() == [0.5]
    assert block.conv.prune_mask.unique().tolist() == [1]
    converted = mask_model(nn.Sequential(nn.Conv2d(8, 8, 1)))[0]
    kaiming_init(converted)
    constant_init(converted, 2.0)
    assert converted.weight.unique().tolist() == [2]


def test_a_layer_parametrized_under_its_mask_is_refused_before_any_training() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)))
    nn.utils.parametrizations.weight_norm(net[2])
    for use in (lambda: fold_masks(net), lambda: MacBudget(net, torch.randn(1, 3, 5, 5))):
        with pytest.raises(ValueError, match=r"'2' was parametrized .* after it got its mask"):
            use()
    assert list(masked_layers(net)) == ["1", "2"]
