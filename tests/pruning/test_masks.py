"""The mask's equations: hand-derived values of binarisation, gradient, freezing, loading."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmitp.pruning import (
    MaskedConv2d,
    MaskedConvTranspose2d,
    MaskedLinear,
    fold_masks,
    freeze_masks,
    mask_model,
    masked_layers,
    slim,
)
from mmitp.pruning.masks import MaskBank, binarize, first_maxima, ranks, ste_derivative


def test_binarize_is_the_sign_next_to_zero_where_rounding_differs() -> None:
    # 0.5 * tanh(1e-9) + 0.5 is 0.5 in float32 and rounds to 0 (half to even)
    mask = torch.tensor([1e-9, -1e-9, 0.0, 1e-45, 3.0, -3.0])
    assert binarize(mask).tolist() == [1, 0, 0, 1, 1, 0]
    assert torch.round(0.5 * torch.tanh(mask) + 0.5).tolist() != binarize(mask).tolist()


def test_binarize_rounds_the_normalised_mask_away_from_zero() -> None:
    mask = torch.cat([torch.linspace(-4, -1e-3, 50), torch.linspace(1e-3, 4, 50)])
    assert torch.equal(binarize(mask), torch.round(0.5 * torch.tanh(mask) + 0.5))


def test_the_largest_entry_is_always_on_and_the_first_on_ties() -> None:
    assert binarize(torch.tensor([-3.0, -1.0, -2.0])).tolist() == [0, 1, 0]
    assert binarize(torch.full((4,), -1.0)).tolist() == [1, 0, 0, 0]
    assert binarize(torch.zeros(3)).tolist() == [1, 0, 0]


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20))
def test_binarize_never_switches_everything_off(values: list[float]) -> None:
    on = binarize(torch.tensor(values))
    assert on.sum() >= 1
    assert all(bool(o) or v <= 0 for o, v in zip(on, values, strict=True))


def test_binarize_keeps_shape_and_memory_format_of_weight_masks() -> None:
    mask = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(binarize(mask), (mask > 0).float())


def test_straight_through_gradient_is_the_tanh_derivative_times_weight_and_output_gradient() -> None:
    conv = MaskedConv2d(2, 1, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([2.0, -3.0]).view(1, 2, 1, 1))
        conv.prune_mask.copy_(torch.tensor([0.5, -1.0]))
    out = conv(torch.tensor([5.0, 7.0]).view(1, 2, 1, 1))
    assert out.item() == 2 * 5  # the second channel is masked
    out.backward()
    # dL/dM_i = w_i * x_i * 0.5 * (1 - tanh(M_i)^2), also where the mask is off: it may come back
    expected = [10 * 0.5 * (1 - math.tanh(0.5) ** 2), -21 * 0.5 * (1 - math.tanh(1.0) ** 2)]
    assert conv.prune_mask.grad is not None
    assert conv.prune_mask.grad.tolist() == pytest.approx(expected)
    # the weight sees the mask: dL/dW = x * M_b
    assert conv.weight.grad is not None
    assert conv.weight.grad.flatten().tolist() == [5, 0]


def test_ste_derivative_at_the_published_initial_value() -> None:
    assert ste_derivative(torch.tensor(1.0)).item() == pytest.approx(0.2099871708, rel=1e-6)


def test_weight_granularity_masks_single_weights() -> None:
    conv = MaskedConv2d(2, 2, 3, mask_granularity="weight", mask_init=0.3)
    assert conv.prune_mask.shape == conv.weight.shape
    assert conv.prune_mask.unique().tolist() == pytest.approx([0.3])
    with torch.no_grad():
        conv.prune_mask.fill_(-1)
        conv.prune_mask[1, 0, 2, 2] = 1
    masked = conv.masked_weight()
    assert masked.nonzero().tolist() == [[1, 0, 2, 2]]
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, masked, conv.bias))


def test_frozen_masks_stay_in_the_graph_with_zero_gradient() -> None:
    conv = MaskedConv2d(4, 2, 1)
    with torch.no_grad():
        conv.prune_mask.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    x = torch.randn(2, 4, 3, 3)
    before = conv(x)
    conv.freeze_mask()
    after = conv(x)
    assert torch.equal(before, after)
    after.square().sum().backward()
    assert conv.prune_mask.grad is not None
    assert conv.prune_mask.grad.tolist() == [0, 0, 0, 0]
    with torch.no_grad():
        conv.prune_mask.fill_(-1)  # whatever decay does to the values: the pattern stands
    assert torch.equal(conv(x), after)
    assert conv.binary_mask().tolist() == [1, 0, 1, 0]
    conv.unfreeze_mask()
    assert conv.binary_mask().tolist() == [1, 0, 1, 0]  # it goes on from where it was frozen


def test_freezing_with_a_pattern_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"pattern of shape \(3,\) for a mask of \(4,\)"):
        MaskedConv2d(4, 2, 1).freeze_mask(torch.ones(3))


def test_unknown_granularity_and_grouped_masked_convolution_are_errors() -> None:
    with pytest.raises(ValueError, match="granularity must be one of"):
        MaskedConv2d(4, 2, 1, mask_granularity="filter")
    with pytest.raises(ValueError, match="grouped convolution carries no mask"):
        MaskedConv2d(4, 4, 1, groups=2)


def dense() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.ConvTranspose2d(5, 2, 3), nn.Flatten(), nn.Linear(50, 2)
    )


def test_dense_checkpoint_loads_strictly_and_means_initial_masks() -> None:
    model = mask_model(dense(), init=0.3, linear=True)
    for layer in masked_layers(model).values():
        layer.freeze_mask((torch.arange(layer.prune_mask.numel()) == 1).float().view(layer.prune_mask.shape))
        with torch.no_grad():
            layer.prune_mask.fill_(-5)
    model.load_state_dict(dense().state_dict(), strict=True)
    for layer in masked_layers(model).values():
        assert not layer.mask_frozen
        assert layer.prune_mask.unique().tolist() == pytest.approx([0.3])
    x = torch.randn(1, 3, 7, 7)
    assert torch.equal(model(x), dense()(x))


def test_a_checkpoint_without_weights_is_still_an_error() -> None:
    state = dense().state_dict()
    del state["1.weight"]
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        mask_model(dense()).load_state_dict(state)


def test_folded_model_is_dense_again_and_loads_into_a_dense_one() -> None:
    model = mask_model(dense(), linear=True)
    for layer in masked_layers(model).values():
        with torch.no_grad():
            layer.prune_mask[::2] = -1
    x = torch.randn(1, 3, 7, 7)
    expected = model(x)
    assert fold_masks(model) is model
    assert [type(m) for m in model] == [type(m) for m in dense()]
    other = dense()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), expected)
    assert other[1].weight[:, ::2].abs().sum() == 0


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_frozen_patterns_and_soft_masks_survive_saving(granularity: str) -> None:
    model = mask_model(dense(), granularity=granularity)
    layers = masked_layers(model)
    for layer in layers.values():
        with torch.no_grad():
            layer.prune_mask.copy_(torch.randn(layer.prune_mask.shape))
    layers["1"].freeze_mask()
    copy = mask_model(dense(), granularity=granularity)
    copy.load_state_dict(model.state_dict())
    for name, layer in masked_layers(copy).items():
        assert layer.mask_frozen == (name == "1")
        assert torch.equal(layer.prune_mask, layers[name].prune_mask)
        assert torch.equal(layer.binary_mask(), layers[name].binary_mask())


@pytest.mark.parametrize("kind", [MaskedConvTranspose2d, MaskedLinear])
def test_other_kinds_mask_their_inputs(kind: type[nn.Module]) -> None:
    layer = (
        nn.ConvTranspose2d(3, 2, 2, output_padding=1, stride=2) if kind is MaskedConvTranspose2d else nn.Linear(3, 2)
    )
    model = mask_model(nn.Sequential(layer), linear=True)
    assert type(model[0]) is kind
    with torch.no_grad():
        model[0].prune_mask.copy_(torch.tensor([1.0, -1, 1]))
    x = torch.randn(2, 3, 4, 4) if kind is MaskedConvTranspose2d else torch.randn(2, 3)
    without = x.clone()
    without[:, 1] = 0
    out = model(x)
    assert torch.equal(out, model(without))
    masked_layers(model)["0"].detach_mask()
    assert torch.equal(out, model(without))


def reference(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A masked convolution written out: the weight times the mask, whose gradient passes straight through."""
    mask = layer.prune_mask
    soft = 0.5 * torch.tanh(mask)
    on = binarize(mask.detach()) + soft - soft.detach()
    return nn.functional.conv2d(x, layer.weight * on.view(1, -1, 1, 1), layer.bias, padding=1)


@pytest.mark.parametrize("size", [2, 12])
def test_input_or_weight_masked_the_gradients_are_the_same(size: int) -> None:
    torch.manual_seed(0)
    layer = MaskedConv2d(6, 5, 3, padding=1).double()
    with torch.no_grad():
        layer.prune_mask.copy_(torch.tensor([0.3, -0.2, 1.0, -1.5, 0.1, 0.7]))
    x = torch.randn(2, 6, size, size, dtype=torch.float64, requires_grad=True)
    assert layer.masks_input(x, layer.weight.numel()) == (size == 2)
    wanted = [x, *layer.parameters()]
    got = torch.autograd.grad(layer(x).square().sum(), wanted)
    expected = torch.autograd.grad(reference(layer, x).square().sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_mask_on_the_input_stays_in_the_graph_with_zero_gradient() -> None:
    layer = MaskedConv2d(6, 5, 3)
    layer.freeze_mask(torch.tensor([1.0, 0, 1, 0, 1, 0]))
    x = torch.randn(1, 6, 3, 3)
    assert layer.masks_input(x, layer.weight.numel())
    layer(x).sum().backward()
    assert layer.prune_mask.grad is not None
    assert layer.prune_mask.grad.tolist() == [0] * 6
    assert layer.weight.grad is not None
    assert layer.weight.grad[:, 1::2].abs().max() == 0


def test_a_bank_changes_neither_output_nor_gradients_and_sees_masks_move() -> None:
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 2, 1)), include=["1", "2"])
    layers = masked_layers(model)
    x = torch.randn(2, 3, 8, 8)
    bank = MaskBank(model, layers.values())
    for _ in range(2):
        for layer in layers.values():
            layer.prune_mask.data.normal_()
        wanted = list(model.parameters())
        with_bank = torch.autograd.grad(model(x).square().sum(), wanted)
        assert all(layer.evaluated is None for layer in layers.values())
        alone = torch.autograd.grad(model[2](model[1](model[0](x))).square().sum(), wanted)
        for a, b in zip(with_bank, alone, strict=True):
            assert torch.equal(a, b)
    seen = []
    model[2].register_forward_pre_hook(lambda layer, args: seen.append(layer.evaluated))
    model(x)
    layers["1"].fold()  # a layer may lose its mask under the bank
    model(x)
    bank.remove()
    model(x)
    assert [ready is not None for ready in seen] == [True, True, False]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [([0.0, 0.0, 0.0], "without any input"), ([1.0, 0.5, 0.0], "binary"), ([1.0, math.nan, 0.0], "binary")],
)
def test_patterns_that_are_empty_or_fractional_are_refused_with_the_layers_name(pattern, text) -> None:
    model = mask_model(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)))
    layers = masked_layers(model)
    with pytest.raises(ValueError, match=text):
        layers["1"].freeze_mask(torch.tensor(pattern))
    with pytest.raises(ValueError, match=f"layer '2' cannot be frozen.*{text}"):
        freeze_masks(model, {"2": torch.tensor(pattern)})
    assert not any(layer.mask_frozen for layer in layers.values())


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.sampled_from([-0.02, -1.0, 0.02, 3.0]))
def test_the_entry_that_no_layer_may_lose_is_the_one_that_is_on_however_close_the_others_are(steps, level) -> None:
    """Neighbours in float32: a difference of the last place decides."""
    masks = torch.tensor(level).repeat(len(steps))
    for i, n in enumerate(steps):
        for _ in range(abs(n)):
            masks[i] = torch.nextafter(masks[i], torch.tensor(math.copysign(math.inf, n)))
    row = torch.zeros(len(steps), dtype=torch.long)
    last = first_maxima(masks, row, 1)
    assert last.nonzero().flatten().tolist() == [steps.index(max(steps))]
    assert bool((binarize(masks) > 0)[last].all())
    assert torch.equal(
        ranks(masks, row, 1),
        torch.tensor([sorted(steps, reverse=True).index(n) + steps[:i].count(n) for i, n in enumerate(steps)]),
    )


@pytest.mark.parametrize("init", [0.0, -1.0, math.nan, math.inf])
def test_masks_cannot_start_switched_off(init) -> None:
    with pytest.raises(ValueError, match="positive"):
        mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), init=init)


def test_unfreezing_goes_on_from_the_pattern_whatever_the_values_were() -> None:
    conv = MaskedConv2d(6, 2, 1)
    conv.prune_mask.data.copy_(torch.tensor([0.9, 0.5, 0.1, -0.1, -0.5, 0.3]))
    conv.freeze_mask(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    conv.unfreeze_mask()
    assert conv.binary_mask().tolist() == [0, 0, 1, 1, 1, 1]
    values = conv.prune_mask.tolist()
    assert values[2] == pytest.approx(0.1)  # on the right side already
    assert values[5] == pytest.approx(0.3)
    assert 0 > values[0] > values[1] > -0.01  # dropped against their values: next to zero, in their order
    assert 0 < values[4] < values[3] < 0.01


def pruned() -> nn.Module:
    """Two masked layers, the first frozen, the second still training, both off their initial values."""
    model = mask_model(dense(), init=0.3, include=["1", "2"])
    one, two = masked_layers(model).values()
    one.freeze_mask(torch.tensor([1.0, 0, 0, 1]))
    with torch.no_grad():
        two.prune_mask.copy_(torch.tensor([0.5, -1, 0.5, -1, 0.5]))
    return model


def masks_of(model: nn.Module) -> list[tuple[bool, list[float], list[float]]]:
    return [(m.mask_frozen, m.prune_mask.tolist(), m.prune_pattern.tolist()) for m in masked_layers(model).values()]


@pytest.mark.parametrize("held", [[], ["4.bias"], ["0.weight", "0.bias"], ["1.bias", "2.bias"]])
def test_a_partial_state_dict_leaves_masks_that_it_says_nothing_of(held: list[str]) -> None:
    model, state = pruned(), dense().state_dict()
    before = masks_of(model)
    found = model.load_state_dict({key: torch.zeros_like(state[key]) for key in held}, strict=False)
    assert masks_of(model) == before
    for key in ("1.weight", "1.prune_mask", "1.prune_pattern", "2.weight", "2.prune_mask", "2.prune_pattern"):
        assert key in found.missing_keys
    assert found.unexpected_keys == []


def test_dense_weights_of_one_layer_start_the_mask_of_that_layer_anew() -> None:
    model, state = pruned(), dense().state_dict()
    before = masks_of(model)
    found = model.load_state_dict({"1.weight": state["1.weight"], "1.bias": state["1.bias"]}, strict=False)
    assert masks_of(model)[0] == (False, pytest.approx([0.3] * 4), [-1] * 4)
    assert masks_of(model)[1] == before[1]
    assert not any(key.startswith("1.") for key in found.missing_keys)


@pytest.mark.parametrize("strict", [True, False])
def test_half_a_mask_is_a_missing_key_and_changes_nothing_else(strict: bool) -> None:
    model = pruned()
    state = model.state_dict()
    del state["1.prune_pattern"], state["2.prune_mask"]
    before = masks_of(model)
    if strict:
        with pytest.raises(RuntimeError, match=r'Missing key.*"1\.prune_pattern", "2\.prune_mask"'):
            model.load_state_dict(state)
    else:
        assert model.load_state_dict(state, strict=False).missing_keys == ["1.prune_pattern", "2.prune_mask"]
    assert masks_of(model) == before


def test_a_dense_weight_that_does_not_fit_leaves_the_mask() -> None:
    model = pruned()
    before = masks_of(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"1.weight": torch.zeros(5, 3, 3, 3)}, strict=False)
    assert masks_of(model) == before


def test_assigning_a_dense_state_dict_fills_a_model_without_storage() -> None:
    model = mask_model(dense().to("meta"), init=0.3)
    model.load_state_dict(dense().state_dict(), assign=True)
    x = torch.randn(1, 3, 7, 7)
    assert torch.equal(model(x), dense()(x))


def test_a_pattern_put_back_says_whether_it_is_frozen() -> None:
    layer = MaskedConv2d(4, 2, 1)
    for pattern, frozen in (([1.0, 0, 1, 1], True), ([-1.0] * 4, False)):
        layer.set_pattern(torch.tensor(pattern))
        assert (layer.mask_frozen, layer.prune_pattern.tolist()) == (frozen, pattern)
    assert layer.prune_mask.tolist() == [1] * 4


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("size", [2, 12])
def test_function_transforms_see_what_autograd_sees(frozen: bool, granularity: str, size: int) -> None:
    torch.manual_seed(0)
    layer = MaskedConv2d(6, 5, 3, padding=1, mask_granularity=granularity).double()
    layer.prune_mask.data.normal_()
    if frozen:
        layer.freeze_mask()
    x, direction = torch.randn(2, 2, 6, size, size, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters, x)
    for name, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(got[name], value)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    for name, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(each[name].sum(0), value)
    # linear in x but for the bias
    moved = torch.func.jvp(layer, (x,), (direction,))[1]
    torch.testing.assert_close(moved, layer(direction) - layer(torch.zeros_like(x)))


def test_an_ensemble_of_frozen_and_training_masks_runs_under_vmap() -> None:
    models = [pruned(), mask_model(dense(), include=["1", "2"])]
    x = torch.randn(2, 3, 7, 7)
    parameters, buffers = torch.func.stack_module_state(models)
    base = pruned()
    out = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    for one, model in zip(out, models, strict=True):
        torch.testing.assert_close(one, model(x))


@pytest.mark.parametrize("bank", [False, True])
def test_a_masked_model_compiles_in_one_piece(bank: bool) -> None:
    torch._dynamo.reset()
    model = pruned()
    twin = pruned()
    if bank:
        MaskBank(model, masked_layers(model).values())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 7, 7)
    for _ in range(2):
        wanted = torch.autograd.grad(twin(x).square().sum(), list(twin.parameters()))
        for got, expected in zip(
            torch.autograd.grad(compiled(x).square().sum(), list(model.parameters())), wanted, strict=True
        ):
            torch.testing.assert_close(got, expected)
        for m in (model, twin):  # what was compiled sees masks move and freeze
            two = masked_layers(m)["2"]
            two.prune_mask.data.copy_(torch.tensor([-1.0, 1, -1, 1, -1]))
            two.freeze_mask()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(3, 4, 1), torch.ones(1, 3, 2, 2)),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), torch.ones(1, 3, 2, 2)),
        (nn.Linear(3, 4), torch.ones(2, 3)),
    ],
)
def test_layers_take_their_input_by_name(layer: nn.Module, x: torch.Tensor) -> None:
    expected = layer(input=x)
    assert torch.equal(mask_model(nn.Sequential(layer), include=["0"])[0](input=x), expected)


def test_masks_that_are_not_finite_are_neither_frozen_nor_slimmed() -> None:
    model = mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)))
    masked_layers(model)["2"].prune_mask.data[1] = math.nan
    for call in (freeze_masks, lambda m: slim(m, torch.zeros(1, 3, 4, 4))):
        with pytest.raises(ValueError, match="layer '2' cannot be .*not finite"):
            call(model)
    with pytest.raises(ValueError, match="not finite"):
        masked_layers(model)["2"].freeze_mask()
    assert not any(layer.mask_frozen for layer in masked_layers(model).values())
