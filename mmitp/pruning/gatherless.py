"""For deployment only: a slimmed network without gathers and scatters, for runtimes that have none (ncnn)."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .layers import bare_type, masked_layers, slim_kind
from .rng import kept_rng
from .slim_layers import SlimLayer
from .verify import call_model, copy_of, difference, difference_in_double, tensors_in


class Picked(nn.Sequential):
    """A layer behind the product that picks its input channels, and before the one that puts its own in their places.

    ``pick`` and ``place`` are convolutions of kernel 1 (linear layers beside linear ones) of zeros and ones.
    """

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        for name, module in self.named_children():
            x = module(x, *args) if name == "layer" else module(x)
        return x


def without_gathers(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Returns a copy in evaluation mode of a slimmed network, whose layers read and write whole tensors.

    A layer that gathers its input channels gets a product of zeros and ones before it, or zeros in its weight for what
    it does not read, whichever is fewer multiplications on the example; where it scatters its outputs, after it. Both
    cost operations that :func:`~mmitp.pruning.slim` had saved: do it for runtimes that cannot gather, or where it is
    the quicker one. The copy computes what the model computes (checked here on the example).

    Args:
        model: slimmed network; one without gathers stays as it is.
        example_inputs: as for :class:`~mmitp.pruning.MacBudget`. Layers that it does not reach keep their gathers.

    Raises:
        ValueError: the network is masked.
        RuntimeError: the copy does not compute the same: the model's code reads these layers in a way of its own.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import MacBudget, freeze_masks, mask_model, slim, without_gathers
        >>> x = torch.randn(1, 3, 8, 8)
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)
        ...     def forward(self, x):
        ...         x = self.stem(x)
        ...         return self.a(x) + self.b(x)
        >>> net = mask_model(Net())
        >>> _ = freeze_masks(net, {"a": torch.arange(8) < 4, "b": torch.arange(8) > 3})
        >>> without_gathers(slim(net, x), x).a
        Picked(
          (pick): Conv2d(8, 4, kernel_size=(1, 1), stride=(1, 1), bias=False)
          (layer): Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    if masked_layers(model):
        raise ValueError("the network carries masks: slim it first (mmitp.pruning.slim), then take its gathers out")
    plain = copy_of(model)
    plain.eval()
    macs = _macs(plain, example_inputs)
    whole: dict[nn.Module, nn.Module] = {layer: _whole(layer, *counted) for layer, counted in macs.items()}
    for parent in list(plain.modules()):
        for name, child in parent._modules.items():
            if child in whole:
                parent._modules[name] = whole[child]
    problem = difference(model, plain, example_inputs, rtol=1e-5)
    if problem and difference_in_double(model, plain, example_inputs, rtol=1e-5):
        raise RuntimeError(f"{type(model).__name__} without its gathers does not compute the same: {problem}")
    return plain


@kept_rng()
@torch.no_grad()
def _macs(model: nn.Module, example_inputs: Any) -> dict[SlimLayer, tuple[int, int, int, int]]:
    """Of each layer that gathers or scatters: the width of what it reads, and, over all its calls, the MACs of a pair
    of channels and the positions read and written."""
    macs: dict[SlimLayer, list[int]] = defaultdict(lambda: [0, 0, 0, 0])

    def note(layer: SlimLayer, args: Any, kwargs: Any, out: Tensor) -> None:
        x, dim = next(tensors_in((args, kwargs))), layer.channel_dim
        kind = slim_kind(layer)
        assert kind is not None
        width, pair, read, written = macs[layer]
        pair += kind.pair_macs(layer, x, out)
        macs[layer] = [x.shape[dim], pair, read + x.numel() // x.shape[dim], written + out.numel() // out.shape[dim]]

    with ExitStack() as hooks:
        for module in model.modules():
            wired = isinstance(module, SlimLayer) and (module.in_index is not None or module.out_index is not None)
            if wired and not module.empty:
                hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
        call_model(model, example_inputs)
    return {layer: (width, pair, read, written) for layer, (width, pair, read, written) in macs.items()}


@torch.no_grad()
def _whole(layer: Any, width: int, pair: int, read: int, written: int) -> nn.Module:
    """The layer, in place, for an input of ``width`` channels and its whole output."""
    kind: Any = slim_kind(layer)
    in_index, out_index, out_width, linear = layer.in_index, layer.out_index, layer.out_width, kind.linear
    bare = bare_type(layer)
    layer.unwire(bare)
    takes_zeros = kind.groups(layer) == 1 and issubclass(bare, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    n_in, n_out = kind.channels(layer)
    parts: dict[str, nn.Module] = {"layer": layer}
    if in_index is not None:
        if takes_zeros and (width - n_in) * n_out * pair <= width * n_in * read:
            n_in = _widen(layer, kind.in_dim, in_index, width, kind.in_attr)
        else:
            parts = {"pick": _product(in_index, width, layer, linear), **parts}
    if out_index is not None:
        if takes_zeros and n_in * (out_width - n_out) * pair <= n_out * out_width * written:
            _widen(layer, kind.out_dim, out_index, out_width, kind.out_attr)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.new_zeros(out_width).index_copy_(0, out_index, layer.bias))
        else:
            parts["place"] = _product(out_index, out_width, layer, linear, place=True)
    return Picked(OrderedDict(parts)) if len(parts) > 1 else layer


def _widen(layer: Any, dim: int, index: Tensor, width: int, attr: str) -> int:
    """Zeros in the weight for the channels that are not in ``index``; returns how many there are then."""
    shape = list(layer.weight.shape)
    shape[dim] = width
    layer.weight = nn.Parameter(layer.weight.new_zeros(shape).index_copy_(dim, index, layer.weight))
    setattr(layer, attr, width)
    return width


def _product(index: Tensor, width: int, layer: Any, linear: bool, place: bool = False) -> nn.Module:
    """The layer of zeros and ones that picks ``index`` out of ``width`` channels, or puts them there."""
    ones = torch.eye(width, dtype=layer.weight.dtype, device=layer.weight.device)[index]
    ones = ones.T if place else ones
    n_out, n_in = ones.shape
    product: Any = nn.Linear(n_in, n_out, bias=False) if linear else nn.Conv2d(n_in, n_out, 1, bias=False)
    product.weight = nn.Parameter((ones if linear else ones[:, :, None, None]).contiguous())
    return product
