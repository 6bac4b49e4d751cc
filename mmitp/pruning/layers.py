"""The masked layers and what the channel graph must know of each kind of layer.

A kind is one small object behind one interface: which class carries the mask, how many channels go in and out, what a
pair of them costs, and how the layer is cut when some of them are gone. Other packages add theirs with one call of
:func:`register_kind`, as the OpenMMLab adapter does for the modulated deformable convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from .masks import MaskedLayer
from .slim_layers import SlimConv2d, SlimConvTranspose2d, SlimLayer, SlimLinear


class MaskedConv2d(MaskedLayer, nn.Conv2d, _ConvNd):
    """``nn.Conv2d`` whose weight is multiplied by a binary mask. Shapes and state-dict keys are those of the base."""

    def __init__(self, *args: Any, mask_granularity: str = "channel", mask_init: float = 1.0, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        if self.groups != 1:
            raise ValueError(
                f"a grouped convolution carries no mask of its own (groups={self.groups}): its groups live while a "
                "reader keeps one of their outputs; use nn.Conv2d"
            )
        self.dense_type = nn.Conv2d
        self.attach_mask(mask_granularity, mask_init)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(*self.masked(input), self.bias)


class MaskedConvTranspose2d(MaskedLayer, nn.ConvTranspose2d, _ConvTransposeNd):
    """``nn.ConvTranspose2d`` with a mask on its input channels (dimension 0 of the weight)."""

    weight_in_dim = 0

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert isinstance(self.padding, tuple)
        stride, padding, kernel, dilation = map(list, (self.stride, self.padding, self.kernel_size, self.dilation))
        extra = self._output_padding(input, output_size, stride, padding, kernel, 2, dilation)
        x, weight = self.masked(input)
        return F.conv_transpose2d(x, weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)


class MaskedLinear(MaskedLayer, nn.Linear):
    """``nn.Linear`` with a mask on its input features."""

    input_dim = -1

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.masked(input), self.bias)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of ``x``: the channels-last one of its dimensions where it has that and no other."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last if last and x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


class Conv2dKind:
    """Dense, grouped and depthwise ``nn.Conv2d``."""

    dense: tuple[type[nn.Module], ...] = (nn.Conv2d,)
    masked: type[MaskedLayer] = MaskedConv2d
    in_attr, out_attr = "in_channels", "out_channels"
    in_dim, out_dim = 1, 0
    linear = False

    def can_mask(self, layer: Any) -> bool:
        """Whether the layer may carry a mask; grouped and depthwise ones follow their readers instead."""
        return self.groups(layer) == 1

    def whole(self, layer: Any) -> bool:
        """Whether this layer's structure forbids removing single channels; it is counted and stays dense."""
        return False

    def groups(self, layer: Any) -> int:
        return int(getattr(layer, "groups", 1))

    def channels(self, layer: Any) -> tuple[int, int]:
        return int(getattr(layer, self.in_attr)), int(getattr(layer, self.out_attr))

    def pair_macs(self, layer: Any, x: Tensor, out: Tensor) -> int:
        """MACs a connected (input channel, output channel) pair costs in this call, the batch included."""
        kh, kw = layer.weight.shape[2:]
        return int(kh) * int(kw) * (out.numel() // out.shape[-3])

    def input_macs(self, layer: Any, x: Tensor, out: Tensor) -> int:
        """MACs an input channel costs besides, however many outputs are kept (an offset convolution)."""
        return 0

    def slice(self, layer: Any, in_keep: Tensor, out_keep: Tensor) -> None:
        """Shrinks a dense layer in place to the kept channels (index tensors); ``groups`` follow."""
        groups = self.groups(layer)
        if groups == 1:
            weight = layer.weight.data.index_select(self.in_dim, in_keep).index_select(self.out_dim, out_keep)
        else:
            # Whole groups go, and the rest keep their width: dimension 0 counts all channels, 1 those of a group.
            first = out_keep if self.out_dim == 0 else in_keep
            weight = layer.weight.data.index_select(0, first)
            layer.groups = len(in_keep) * groups // self.channels(layer)[0]
        layer.weight.data = weight.contiguous(memory_format=memory_format(layer.weight.data))
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.index_select(0, out_keep)
        setattr(layer, self.in_attr, len(in_keep))
        setattr(layer, self.out_attr, len(out_keep))


class ConvTranspose2dKind(Conv2dKind):
    dense = (nn.ConvTranspose2d,)
    masked = MaskedConvTranspose2d
    in_dim, out_dim = 0, 1

    def pair_macs(self, layer: Any, x: Tensor, out: Tensor) -> int:
        kh, kw = layer.weight.shape[2:]
        return int(kh) * int(kw) * (x.numel() // x.shape[-3])


class LinearKind(Conv2dKind):
    dense = (nn.Linear,)
    masked = MaskedLinear
    in_attr, out_attr = "in_features", "out_features"
    linear = True

    def pair_macs(self, layer: Any, x: Tensor, out: Tensor) -> int:
        return out.numel() // out.shape[-1]


class CountedKind(Conv2dKind):
    """A layer that is counted and never masked or cut."""

    def can_mask(self, layer: nn.Module) -> bool:
        return False

    def whole(self, layer: nn.Module) -> bool:
        return True


class ChannelPad(nn.Module):
    """Puts zero channels before and after those it is given (dimension 1 of N x C x H x W).

    A model's own ``F.pad`` fixes the places of its channels; this module names them, so that slimming can narrow what
    comes in and what goes out. A subclass may treat the channels it is given one by one besides (subsample, say).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``in_channels``.
        front: zero channels before the input's; by default half of the new ones, rounded down.

    Raises:
        ValueError: the output does not hold every input channel and the zeros before it.
    """

    def __init__(self, in_channels: int, out_channels: int, front: int | None = None) -> None:
        super().__init__()
        if front is None:
            front = (out_channels - in_channels) // 2
        if not 0 <= front <= out_channels - in_channels:
            raise ValueError(
                f"{type(self).__name__} maps {in_channels} channels into {out_channels} with {front} zero channels in "
                "front: the output must hold every input channel and the zeros before it"
            )
        self.in_channels, self.out_channels, self.front = in_channels, out_channels, front

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.front, self.out_channels - self.front - self.in_channels))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, front={self.front}"


_KINDS: dict[type[nn.Module], Conv2dKind] = {}  # by dense and by masked type
_SLIM: dict[type[nn.Module], type[SlimLayer]] = {}  # by dense type, and by masked type once it was needed
_CHANNELWISE: set[type[nn.Module]] = set()


def register_kind(kind: Conv2dKind, slim: type[SlimLayer] | None = None) -> None:
    """Makes a kind of layer known to the conversion, the channel graph, the budget and the slimming.

    A masked type derives from :class:`~mmitp.pruning.MaskedLayer`, the dense type *and the dense type's own bases*:
    mmengine's ``init_cfg`` finds the layers to initialise by the names of a class and its direct bases, and would pass
    by a layer that is a ``Conv2d`` one base further down. It takes the dense type's arguments by the same names. A slim
    type derives from :class:`~mmitp.pruning.slim_layers.SlimLayer` and the same bases.

    Args:
        kind: how to mask, count and cut it.
        slim: the dense type with gather and scatter, for layers that read or compute a part of a tensor. Needed by
            kinds that can be masked; None for those that are only counted.

    Raises:
        ValueError: it is no kind (a class and no object of it, say); ``slim`` does not derive from ``SlimLayer`` and
            from every dense type of the kind.
    """
    if not isinstance(kind, Conv2dKind):
        raise ValueError(
            f"register_kind takes an object of a Conv2dKind's class (register_kind(MyKind())), got {kind!r}"
        )
    for cls in kind.dense:
        if slim is not None and not (issubclass(slim, SlimLayer) and issubclass(slim, cls)):
            raise ValueError(f"the slim type {slim.__name__} must derive from SlimLayer and from {cls.__name__}")
    for cls in kind.dense:
        _KINDS[cls] = kind
        if slim is not None:
            _SLIM[cls] = slim
    if not isinstance(kind, CountedKind):
        _KINDS[kind.masked] = kind


def register_channelwise(*types: type[nn.Module]) -> None:
    """Declares module types that treat every channel of their first input by itself and hold no channel parameters.

    By exact type. (For functions there is :func:`~mmitp.pruning.register_op`.)

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import MacBudget, mask_model, register_channelwise
        >>> class Bessel(nn.Module):
        ...     def forward(self, x):
        ...         return torch.special.i0e(x)
        >>> net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 3), Bessel(), nn.Conv2d(8, 4, 3)))
        >>> MacBudget(net, torch.randn(1, 3, 8, 8)).unfollowed
        {'1': 'special_i0e is not known to treat channels one by one'}
        >>> register_channelwise(Bessel)
        >>> MacBudget(net, torch.randn(1, 3, 8, 8)).unfollowed
        {}
    """
    _CHANNELWISE.update(types)


def kind_of(module: nn.Module) -> Conv2dKind | None:
    """The kind of a layer by its exact type (a subclass may compute something else), or None.

    None too where the weight is computed anew at every call (weight and spectral normalisation by hooks,
    ``torch.nn.utils.prune``): such a layer cannot be cut by cutting its weight.
    """
    kind = _KINDS.get(type(module))
    return kind if kind is not None and module._parameters.get("weight") is not None else None


def is_channelwise(module: nn.Module) -> bool:
    """Whether the exact type was declared with :func:`register_channelwise`."""
    return type(module) in _CHANNELWISE


def slim_type(layer: nn.Module) -> type[SlimLayer]:
    """The layer's type with gather and scatter: what :func:`register_kind` was given, under the mask of a masked one.

    Raises:
        ValueError: it was given none.
    """
    dense = layer.dense_type if isinstance(layer, MaskedLayer) else type(layer)
    if dense not in _SLIM:
        raise ValueError(
            f"a {dense.__name__} has to gather or scatter channels once slimmed, and its kind was registered without a "
            "type that does: register_kind(kind, slim=...)"
        )
    if not isinstance(layer, MaskedLayer):
        return _SLIM[dense]
    return _slim_masked(type(layer), dense)


def _slim_masked(masked: type[nn.Module], dense: type[nn.Module]) -> type[SlimLayer]:
    """A masked type with gather and scatter, made when it is first needed."""
    if masked not in _SLIM:
        # SlimLayer.forward reads, leaves the product to the next class in line, which is the masked one, and writes.
        methods = dict(forward=SlimLayer.forward, __reduce_ex__=_reduced)
        _SLIM[masked] = type(f"Slim{masked.__name__}", (_SLIM[dense], masked), methods)
    return _SLIM[masked]


def _reduced(layer: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """How a layer of a type that no module holds is copied and pickled: by the types that it was made of."""
    return _empty, (bare_type(layer), layer.dense_type), layer.__getstate__()


def _empty(masked: type[nn.Module], dense: type[nn.Module]) -> nn.Module:
    cls = _slim_masked(masked, dense)
    return cls.__new__(cls)


def bare_type(layer: nn.Module) -> type[nn.Module]:
    """The layer's type without gather and scatter."""
    return next((bare for bare, slim in _SLIM.items() if type(layer) is slim), type(layer))


def slim_kind(module: nn.Module) -> Conv2dKind | None:
    """:func:`kind_of`, for layers with gather and scatter too."""
    bare = bare_type(module)
    return kind_of(module) if bare is type(module) else _KINDS[bare]


register_kind(Conv2dKind(), slim=SlimConv2d)
register_kind(ConvTranspose2dKind(), slim=SlimConvTranspose2d)
register_kind(LinearKind(), slim=SlimLinear)


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """All masked layers of a model by name, each once, in registration order.

    Example:
        >>> from torch import nn
        >>> from mmitp.pruning import mask_model, masked_layers
        >>> net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)))
        >>> {name: tuple(layer.prune_mask.shape) for name, layer in masked_layers(net).items()}
        {'1': (8,), '2': (8,)}
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedLayer)}


def require_plain(model: nn.Module) -> None:
    """Refuses masked layers that were parametrized since: without its mask such a layer could not find its weight.

    Raises:
        ValueError: names the first of them.
    """
    for name, layer in masked_layers(model).items():
        if is_parametrized(layer):
            raise ValueError(
                f"{name!r} was parametrized (weight_norm, spectral_norm, register_parametrization) after it got its "
                "mask, which can then neither count nor be folded. Parametrize the model before mask_model, which "
                "leaves such layers dense, or take the parametrization off (remove_parametrizations)"
            )


@torch.no_grad()
def randomize_masks(model: nn.Module, keep: float, generator: torch.Generator | None = None) -> None:
    """Sets every trainable mask to random values of which about the fraction ``keep`` is on (for checks and tests)."""
    tied: dict[int, float] = {}
    for layer in masked_layers(model).values():
        values = keep - torch.rand(layer.prune_mask.shape, generator=generator)
        if layer.mask_ties is not None:
            pairs = zip(layer.mask_ties.tolist(), values.tolist(), strict=True)
            values = torch.tensor([tied.setdefault(key, value) for key, value in pairs])
        layer.prune_mask.copy_(values.to(layer.prune_mask.device))
