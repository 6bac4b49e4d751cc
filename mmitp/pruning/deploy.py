"""For deployment only: BatchNorm folded into the layers before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from .graph import shared_parameters
from .graph.ops import METADATA
from .layers import slim_kind
from .rng import kept_rng
from .slim_layers import SlimLayer
from .verify import call_model, copy_of, difference, difference_in_double, doubled, tensors_in

_SHAPE_ONLY = frozenset("shape dtype device ndim layout is_cuda requires_grad".split())


def fold_norms(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Returns a copy in evaluation mode with every BatchNorm folded into the layer right before it, where there is one.

    ``y = s * (W x + c - mean) + b`` with ``s = gamma / sqrt(var + eps)`` becomes ``(s W) x + s (c - mean) + b``. One
    pass of the example shows which layer's output goes to which norm and to nothing else; other norms stay, and so does
    one whose channels are not the layer's (``BatchNorm1d`` over the positions of a sequence), and one that a forward
    hook reads or changes, or whose layer's output one does. The copy
    computes what the model computes (checked here on the example, but for the values of a model on the meta device); it
    is for inference, its training would differ.

    Args:
        model: dense, masked or slimmed network.
        example_inputs: as for :class:`~mmitp.pruning.MacBudget`.

    Raises:
        RuntimeError: the copy does not compute the same: the model reads the folded layers in a way that cannot be
            seen (nothing wrong is returned).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import fold_norms
        >>> fold_norms(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), torch.randn(1, 3, 5, 5))
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
        )
    """
    folded = _folded(model, example_inputs)
    problem = difference(model, folded, example_inputs, rtol=1e-5)
    if problem and _real_difference(model, folded, example_inputs):
        raise RuntimeError(f"{type(model).__name__} with its norms folded does not compute the same: {problem}")
    return folded


def _folded(model: nn.Module, example_inputs: Any) -> nn.Module:
    folded = copy_of(model)
    folded.eval()
    pairs = _pairs(folded, example_inputs)
    for layer, norm in pairs.items():
        fold_norm(layer, norm)
    norms = set(pairs.values())
    for parent in list(folded.modules()):
        for name, child in parent._modules.items():
            if child in norms:
                parent._modules[name] = nn.Identity()
    return folded


def _real_difference(model: nn.Module, folded: nn.Module, example_inputs: Any) -> str:
    """What differs in float64, where rounding does not.

    Weights of half precision are rounded anew by folding: there both networks are compared as float64 would fold them.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model, example_inputs = copy_of(model).double(), doubled(example_inputs)
        folded = _folded(model, example_inputs)
    return difference_in_double(model, folded, example_inputs, rtol=1e-5)


class _Reads(TorchFunctionMode):
    """Which layer made a tensor, and everything that read it, during one pass (strong references: ids stay unique)."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.made: dict[int, tuple[Tensor, nn.Module]] = {}
        self.readers: dict[int, list[Any]] = {}

    def read(self, by: Any, tensors: Any) -> None:
        for t in tensors_in(tensors):
            if id(t) in self.made:
                self.readers[id(t)].append(by)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if self.depth == 0 and name not in METADATA and attribute not in _SHAPE_ONLY:
            self.read(name, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _hooked(module: nn.Module) -> bool:
    """Whether hooks read or change what a layer gives, or what a norm takes and gives: folding would pass them by."""
    hooks = [hook for hook in module._forward_hooks.values() if not getattr(hook, "of_empty_layers", False)]
    return bool(hooks) or isinstance(module, _BatchNorm) and bool(module._forward_pre_hooks)


@kept_rng()
@torch.no_grad()
def _pairs(model: nn.Module, example_inputs: Any) -> dict[nn.Module, _BatchNorm]:
    """Layer -> the norm that alone reads its output, at every call, and reads nothing else."""
    reads = _Reads()
    hooked = {module for module in model.modules() if _hooked(module)}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if reads.depth == 0:
            with torch._C.DisableTorchFunction():
                reads.read(module, (args, kwargs))
        reads.depth += 1

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        reads.depth -= 1
        if reads.depth == 0 and slim_kind(module) is not None:
            reads.made[id(output)] = (output, module)
            reads.readers[id(output)] = []

    hooks = ExitStack()
    sources: dict[nn.Module, list[Any]] = {}  # norm -> what its calls read

    def note_source(norm: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(tensors_in((args, kwargs)))
        _, layer = reads.made.get(id(x), (x, None))
        if layer is not None and x.dim() - (1 if slim_kind(layer).linear else 3) != 1:  # type: ignore[union-attr]
            layer = None  # the norm's channels are another dimension than the layer's: positions of a sequence
        sources.setdefault(norm, []).append(layer)

    for module in model.modules():
        norm = isinstance(module, _BatchNorm)
        if norm or slim_kind(module) is not None:
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        if norm:
            hooks.enter_context(module.register_forward_pre_hook(note_source, with_kwargs=True))
    with hooks, reads:
        out = call_model(model, example_inputs)
    reads.read("the model's output", out)
    fate: dict[nn.Module, set[Any]] = {}
    for _, layer in reads.made.values():
        fate[layer] = set()
    for key, (_, layer) in reads.made.items():
        readers = reads.readers[key]
        fate[layer].add(readers[0] if len(readers) == 1 else None)
    shared = shared_parameters(model)
    pairs: dict[nn.Module, _BatchNorm] = {}
    for layer, norms in fate.items():
        (norm, *others) = norms
        if others or not isinstance(norm, _BatchNorm) or norm.running_mean is None or {layer, norm} & hooked:
            continue
        if set(sources.get(norm, [])) == {layer} and not any(id(p) in shared for p in layer.parameters()):
            pairs[layer] = norm
    return pairs


@torch.no_grad()
def fold_norm(layer: Any, norm: _BatchNorm) -> None:
    """Folds a norm into the layer before it, in place; a slimmed layer takes what belongs to its own outputs."""
    kind = slim_kind(layer)
    assert kind is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if isinstance(layer, SlimLayer) and layer.out_index is not None:
        # What is not computed is zero and nobody reads it: the norm's constants there go with it.
        scale, shift = scale[layer.out_index], shift[layer.out_index]
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    weight = layer.weight
    shape = [1] * weight.dim()
    if kind.out_dim == 0:
        shape[0] = -1
        factor = scale.view(shape)
    else:
        # (in, out / groups, ...): the rows of a group hold its own outputs
        groups = kind.groups(layer)
        shape[1] = len(scale) // groups
        factor = scale.view(groups, 1, *shape[1:])
        factor = factor.expand(groups, weight.shape[0] // groups, *shape[1:]).reshape(weight.shape[0], *shape[1:])
    weight.copy_(weight.double() * factor)
    layer.bias = nn.Parameter(bias.to(weight.dtype))
