import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmitp.ops import deform_conv as module
from mmitp.ops import modulated_deform_conv2d

# name: (N, C, H, W, O, kernel, stride, padding, dilation, groups, deform_groups)
CASES = {
    "plain": (2, 2, 4, 3, 3, (3, 3), 1, 1, 1, 1, 1),
    "groups": (1, 4, 5, 2, 2, (3, 3), (2, 1), (1, 2), 1, 2, 1),
    "deform_groups": (1, 2, 4, 4, 2, (3, 2), 1, (0, 1), (1, 2), 1, 2),
    "both": (2, 4, 2, 3, 2, (2, 3), 2, 2, 1, 2, 2),
    "one_row": (1, 2, 1, 7, 2, (1, 3), 1, (0, 1), 1, 1, 1),
}


def arguments(name, spread=1.5, dtype=torch.float64, seed=0):
    n, c, h, w, o, (kh, kw), stride, padding, dilation, groups, deform = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    (sh, sw), (ph, pw), (dh, dw) = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation))
    ho, wo = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    taps = deform * kh * kw

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    # displacements keep away from whole pixels, where the bilinear sample has a kink and no derivative
    offset = draw(n, 2 * taps, ho, wo) * spread
    offset = offset.floor() + 0.1 + 0.8 * (offset - offset.floor())
    tensors = (draw(n, c, h, w), offset, draw(n, taps, ho, wo), draw(o, c // groups, kh, kw), draw(o))
    return tensors, dict(stride=stride, padding=padding, dilation=dilation, groups=groups, deform_groups=deform)


def loops(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    """The definition, one number at a time."""
    (sh, sw), (ph, pw), (dh, dw) = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation))
    n, c, h, w = x.shape
    o, cg, kh, kw = weight.shape
    out = torch.zeros(n, o, *offset.shape[2:], dtype=x.dtype)

    def sample(image, channel, y, x_):
        total = 0.0
        for yy in (math.floor(y), math.floor(y) + 1):
            for xx in (math.floor(x_), math.floor(x_) + 1):
                if 0 <= yy < h and 0 <= xx < w:
                    total += (1 - abs(y - yy)) * (1 - abs(x_ - xx)) * x[image, channel, yy, xx].item()
        return total

    for b, f, i, j in torch.cartesian_prod(*(torch.arange(s) for s in out.shape)).tolist():
        value = bias[f].item()
        for k in range(cg):
            channel = f // (o // groups) * cg + k
            group = channel // (c // deform_groups)
            for t in range(kh * kw):
                tap = group * kh * kw + t
                y = i * sh - ph + t // kw * dh + offset[b, 2 * tap, i, j].item()
                x_ = j * sw - pw + t % kw * dw + offset[b, 2 * tap + 1, i, j].item()
                value += weight[f, k, t // kw, t % kw].item() * mask[b, tap, i, j].item() * sample(b, channel, y, x_)
        out[b, f, i, j] = value
    return out


WAYS = {"rows": module._by_rows, "grid_sample": module._by_grid_sample, "images": module._by_images}


@pytest.fixture(params=WAYS)
def implementation(request):
    function = WAYS[request.param]

    def call(x, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deform_groups=1):
        lay = module._layout(x, offset, mask, weight, stride, padding, dilation, groups, deform_groups)
        return function(x, offset, mask, weight, bias, lay)

    return call


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name, implementation):
    tensors, options = arguments(name)
    torch.testing.assert_close(implementation(*tensors, **options), loops(*tensors, **options), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", ["rows", "grid_sample"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_all_five_gradients(name, implementation):
    tensors, options = arguments(name)
    tensors = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(lambda *a: implementation(*a, **options), tensors)


@pytest.mark.parametrize("name", CASES)
def test_blocks_do_not_change_the_result(name, implementation, monkeypatch):
    tensors, options = arguments(name)
    tensors = tuple(t.requires_grad_() for t in tensors)
    whole = implementation(*tensors, **options)
    gradients = torch.autograd.grad(whole.sin().sum(), tensors)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 5)
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", 1)
    monkeypatch.setattr(module, "_IMAGE_NUMBERS", 1)
    parts = implementation(*tensors, **options)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.sin().sum(), tensors), gradients)


@pytest.mark.parametrize("name", CASES)
def test_equals_torchvision(name, implementation):
    try:
        from torchvision.extension import _has_ops
        from torchvision.ops import deform_conv2d
    except (ImportError, RuntimeError):
        pytest.skip("torchvision cannot be imported")
    if not _has_ops():
        pytest.skip("torchvision's compiled operators do not load beside this torch")
    tensors, options = arguments(name)
    tensors = tuple(t.requires_grad_() for t in tensors)
    x, offset, mask, weight, bias = tensors
    reference = deform_conv2d(
        x, offset, weight, bias, mask=mask, **{k: options[k] for k in ("stride", "padding", "dilation")}
    )
    ours = implementation(*tensors, **options)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sin().sum(), tensors), torch.autograd.grad(reference.sin().sum(), tensors)
    )


def test_without_displacement_it_is_a_convolution():
    (x, offset, mask, weight, bias), options = arguments("groups")
    out = modulated_deform_conv2d(x, offset * 0, mask * 0 + 1, weight, bias, **options)
    reference = torch.nn.functional.conv2d(x, weight, bias, (2, 1), (1, 2), groups=2)
    torch.testing.assert_close(out, reference)


def test_no_mask_means_ones_and_no_mask_gradient():
    (x, offset, mask, weight, bias), options = arguments("deform_groups")
    weight.requires_grad_()
    offset.requires_grad_()
    results = [modulated_deform_conv2d(x, offset, m, weight, bias, **options) for m in (None, torch.ones_like(mask))]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(r.sin().sum(), (weight, offset)) for r in results]
    torch.testing.assert_close(*gradients)


@settings(max_examples=25, deadline=None)
@given(dy=st.integers(-9, 9), dx=st.integers(-9, 9))
def test_whole_pixel_displacement_shifts_the_image_and_zeros_come_in(dy, dx):
    x = torch.arange(1.0, 31.0).view(1, 1, 5, 6)
    offset = torch.tensor([float(dy), float(dx)]).view(1, 2, 1, 1).expand(1, 2, 5, 6)
    out = modulated_deform_conv2d(x, offset, torch.ones(1, 1, 5, 6), torch.ones(1, 1, 1, 1))
    expected = torch.nn.functional.pad(x, (9, 9, 9, 9))[:, :, 9 + dy : 14 + dy, 9 + dx : 15 + dx]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("value", [1e30, -1e30, math.inf, math.nan])
def test_displacement_out_of_all_bounds_reads_zero(value):
    (x, offset, mask, weight, _), options = arguments("plain", dtype=torch.float32)
    out = modulated_deform_conv2d(x, torch.full_like(offset, value), mask, weight, **options)
    assert torch.equal(out, torch.zeros_like(out))


def test_gradient_of_one_argument_alone():
    tensors, options = arguments("plain")
    for position, tensor in enumerate(tensors):
        alone = tensor.clone().requires_grad_()
        mixed = (*tensors[:position], alone, *tensors[position + 1 :])
        out = modulated_deform_conv2d(*mixed, **options).sin().sum()
        everything = tuple(t.clone().requires_grad_() for t in tensors)
        full = torch.autograd.grad(modulated_deform_conv2d(*everything, **options).sin().sum(), everything)
        torch.testing.assert_close(torch.autograd.grad(out, alone)[0], full[position])


def test_empty_batch_keeps_shape_and_graph():
    (x, offset, mask, weight, bias), options = arguments("plain")
    weight.requires_grad_()
    out = modulated_deform_conv2d(x[:0], offset[:0], mask[:0], weight, bias, **options)
    assert out.shape == (0, 3, 4, 3)
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], torch.zeros_like(weight))


def numbers_kept(function, n):
    """Per input number: those kept for the backward pass beyond the arguments, and those of the largest tensor made.

    16 channels of 12 x 20, nine taps.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    tensors = [torch.randn(n, 16, 12, 20), torch.randn(n, 18, 12, 20), torch.rand(n, 9, 12, 20)]
    tensors = [t.requires_grad_() for t in (*tensors, torch.randn(8, 16, 3, 3), torch.randn(8))]
    arguments = {t.untyped_storage().data_ptr() for t in tensors}
    kept: dict[int, torch.Tensor] = {}
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    lay = module._layout(*tensors[:4], 1, 1, 1, 1, 1)
    with Watch():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function(*tensors, lay)
        torch.autograd.grad(out.sum(), tensors)
    size = n * 16 * 12 * 20
    return sum(t.numel() for key, t in kept.items() if key not in arguments) / size, largest / size


def test_no_columns_are_kept_for_the_backward_pass(monkeypatch):
    """Before and after modulation there are nine numbers for each of the input."""
    monkeypatch.setattr(module, "_IMAGE_NUMBERS", 2 * 9 * 16 * 12 * 20)
    kept, largest = numbers_kept(module._by_grid_sample, 8)
    assert kept > 18
    assert largest == 9
    for way in (module._by_rows, module._by_images):
        kept, _ = numbers_kept(way, 8)
        assert kept == 0
    assert numbers_kept(module._by_images, 8)[1] == 9 * 2 / 8  # the columns of two images of eight


def test_channels_last_in_gives_channels_last_out():
    tensors, options = arguments("plain", dtype=torch.float32)
    x = tensors[0].contiguous(memory_format=torch.channels_last)
    out = modulated_deform_conv2d(x, *tensors[1:], **options)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, modulated_deform_conv2d(*tensors, **options))


def test_autocast_and_low_precision_sample_in_float32():
    tensors, options = arguments("plain", dtype=torch.float32)
    exact = modulated_deform_conv2d(*tensors, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = tensors[0].clone().requires_grad_()
        out = modulated_deform_conv2d(x, *tensors[1:], **options)
        torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, exact)
    low = modulated_deform_conv2d(tensors[0].bfloat16(), *tensors[1:], **options)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.2)


def test_flop_counter_sees_the_matrix_product():
    from torch.utils.flop_counter import FlopCounterMode

    tensors, options = arguments("groups", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = modulated_deform_conv2d(*tensors, **options)
    assert counter.get_total_flops() == 2 * out.numel() * (4 // 2) * 9


@pytest.mark.filterwarnings("ignore")  # of the tracer, about shapes taken as constants
def test_traced_it_consists_of_standard_operators():
    tensors, options = arguments("both", dtype=torch.float32)
    traced = torch.jit.trace(lambda *a: modulated_deform_conv2d(*a, **options), tensors)
    assert "aten::grid_sampler" in str(traced.graph)
    torch.testing.assert_close(traced(*tensors), modulated_deform_conv2d(*tensors, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(offset=torch.zeros(2, 16, 4, 3)), "offset must be"),
        (dict(mask=torch.zeros(2, 9, 4, 4)), "mask must be"),
        (dict(groups=3), "do not fit"),
        (dict(dilation=9), "too small"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    (x, offset, mask, weight, bias), options = arguments("plain", dtype=torch.float32)
    call = dict(x=x, offset=offset, mask=mask, weight=weight, bias=bias, **options) | change
    with pytest.raises(ValueError, match=message):
        modulated_deform_conv2d(**call)
