"""What every check of a network needs: run it undisturbed, hold its masks at a pattern, compare what it gives.

At the bottom of the package: it knows no budget and no slimming, which check themselves with it.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .masks import MaskedLayer
from .rng import kept_rng

#: How deep outputs are looked into: containers in containers, attributes of objects.
DEPTH = 6


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Runs ``model(x)``, ``model(*tuple)`` or ``model(**dict)``."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def _children(obj: Any) -> Iterator[tuple[str, Any]]:
    """What a container or a plain object holds, with how it is written: ``['boxes']``, ``[0]``, ``.scores``."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield f"[{key!r}]", value
    elif isinstance(obj, (list, tuple, set, frozenset, deque)):
        for i, value in enumerate(obj):
            yield f"[{i}]", value
    elif not isinstance(obj, (nn.Module, type)):
        for key, value in vars(obj).items() if hasattr(obj, "__dict__") else ():
            yield f".{key}", value
        for cls in type(obj).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for key in (slots,) if isinstance(slots, str) else slots:
                yield f".{key}", getattr(obj, key, None)


def tensors_in(obj: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """All tensors in nested containers and plain objects."""
    if isinstance(obj, Tensor):
        yield obj
    elif depth > 0:
        for _, child in _children(obj):
            yield from tensors_in(child, depth - 1)


def values_in(obj: Any, path: str = "output", depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Tensors, numpy arrays and numbers in nested containers and plain objects, as tensors, with their places."""
    if isinstance(obj, Tensor):
        yield path, obj
    elif isinstance(obj, (bool, int, float, complex, np.generic)) or isinstance(obj, np.ndarray):
        if np.asarray(obj).dtype.kind in "biufc":
            yield path, torch.as_tensor(obj)
    elif depth > 0:
        for key, child in _children(obj):
            yield from values_in(child, path + key, depth - 1)


def copy_of(model: nn.Module) -> nn.Module:
    """``copy.deepcopy`` of a model that may hold tensors of a graph, whose values are copied.

    Weight and spectral normalisation by hooks keep the weight of the last pass, and users' code keeps feature maps.
    Functions that modules keep (mmpretrain's MultiTaskHead wraps the losses of its heads, users wrap ``forward``) work
    on the copy, too: ``copy.deepcopy`` leaves them with the model's own modules.
    """
    held = [t for module in model.modules() for t in tensors_in(vars(module), depth=3) if not t.is_leaf]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held}
    copied_model = copy.deepcopy(model, memo)
    for module in copied_model.modules():
        tables: list[dict[Any, Any]] = [vars(module), module._forward_pre_hooks, module._forward_hooks]
        for kept in tables:
            for name, value in kept.items():
                if isinstance(value, FunctionType):
                    kept[name] = _of_copy(value, memo)
    return copied_model


def _of_copy(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with the copies of a model's modules in place of those that it closes over.

    Args:
        function: kept by a module.
        memo: of ``copy.deepcopy``: the id of what was copied -> its copy. Functions are added.
    """
    if id(function) in memo or function.__closure__ is None:
        return memo.get(id(function), function)
    cells = tuple(CellType() for _ in function.__closure__)
    new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    new.__kwdefaults__, new.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    memo[id(function)] = new  # first: it may close over itself
    for cell, old in zip(cells, function.__closure__, strict=True):
        if old == CellType():  # a name without a value as yet
            continue
        value = old.cell_contents
        if isinstance(value, FunctionType):
            cell.cell_contents = _of_copy(value, memo)
        elif id(getattr(value, "__self__", value)) in memo:  # a module or a method of one
            cell.cell_contents = copy.deepcopy(value, memo)
        else:
            cell.cell_contents = value
    return new


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards every module in the mode it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def train_without_noise(model: nn.Module) -> None:
    """Training mode, but for dropout and its like, which draw anew for a narrower tensor: leaves without any state."""
    model.train()
    for module in model.modules():
        if all(next(things, None) is None for things in (module.children(), module.parameters(), module.buffers())):
            module.eval()


@contextmanager
def frozen_at(patterns: Mapping[MaskedLayer, Tensor]) -> Iterator[None]:
    """Masks frozen at these patterns, and afterwards in the state they were in; the masks themselves stay."""
    before = {layer: layer.prune_pattern.clone() for layer in patterns}
    try:
        for layer, pattern in patterns.items():
            layer.freeze_mask(pattern.to(layer.prune_mask))
        yield
    finally:
        for layer, old in before.items():
            layer.set_pattern(old)


@torch.no_grad()
def outputs(model: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    """What the model gives in evaluation mode, place -> value (copies, so that a model may write into its outputs).

    A network that draws random numbers draws the same at every call.
    """
    with eval_mode(model), kept_rng(seed=0):
        return {path: value.clone() for path, value in values_in(call_model(model, copied(example_inputs)))}


def compare(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], rtol: float) -> str:
    """Empty if two networks' outputs are the same, else the first place where they are not.

    Booleans and integers have to be equal. Floating-point and complex numbers may differ by ``rtol`` of the largest
    finite value of their tensor (at least 1e-6); infinities of one sign are equal, and so are NaNs. On the meta device
    there are no values to compare.
    """
    if not expected:
        return "the model gives no tensor and no number that could be compared"
    for place in [*expected, *got]:
        if place not in got:
            return f"{place} is missing"
        if place not in expected:
            return f"{place} is none of the model's"
    for place, value in expected.items():
        if problem := _unlike(value, got[place], rtol):
            return f"{place} {problem}"
    return ""


def _unlike(a: Tensor, b: Tensor, rtol: float) -> str:
    if a.shape != b.shape:
        return f"has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
    if _exact(a) != _exact(b) or a.is_complex() != b.is_complex() or (a.dtype == torch.bool) != (b.dtype == torch.bool):
        return f"has type {b.dtype} instead of {a.dtype}"
    if a.is_meta or b.is_meta:
        return "" if a.is_meta and b.is_meta else f"is on {b.device} instead of {a.device}"
    if _exact(a):
        wrong = int((_dense(a).cpu() != _dense(b).cpu()).sum())
        return f"differs in {wrong} of {a.numel()} values" if wrong else ""
    gap, scale = _gap_and_scale(a, b)
    if math.isinf(gap):
        return "has infinite values or NaN in other places"
    return f"differs by {gap:.3g} at a scale of {scale:.3g}" if gap > rtol * max(scale, 1e-6) else ""


def relative_gap(expected: Tensor, got: Tensor) -> float:
    """Largest difference of two tensors of one shape, in parts of the largest finite value (at least 1e-6).

    Infinite where one has an infinity or a NaN that the other has not.
    """
    gap, scale = _gap_and_scale(expected, got)
    return gap / max(scale, 1e-6)


def _gap_and_scale(a: Tensor, b: Tensor) -> tuple[float, float]:
    a, b = (_dense(t.detach()).cpu() for t in (a, b))
    a, b = (torch.view_as_real(t.to(torch.complex128)) if t.is_complex() else t.double() for t in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())  # equal infinities too
    if not bool((same | (a.isfinite() & b.isfinite())).all()):
        return math.inf, 0.0
    largest = a[a.isfinite()].abs()
    gaps = (a - b)[~same].abs()
    return (float(gaps.max()) if gaps.numel() else 0.0, float(largest.max()) if largest.numel() else 0.0)


def _exact(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.is_quantized)


def _dense(t: Tensor) -> Tensor:
    if t.is_quantized:
        return t.dequantize()
    return t if t.layout == torch.strided else t.to_dense()


def difference(model: nn.Module, other: nn.Module, example_inputs: Any, rtol: float = 1e-4) -> str:
    """Empty if both models give the same in evaluation mode by :func:`compare`, else what differs.

    An error that only ``other`` raises is a difference; one of ``model`` is raised.
    """
    expected = outputs(model, example_inputs)
    try:
        got = outputs(other, example_inputs)
    except Exception as error:  # narrower tensors may break any line of a model's code
        return f"{type(error).__name__}: {error}"
    return compare(expected, got, rtol)


def difference_in_double(model: nn.Module, other: nn.Module, example_inputs: Any, rtol: float = 1e-4) -> str:
    """:func:`difference` of float64 copies of both models."""
    try:
        return difference(copy_of(model).double(), copy_of(other).double(), doubled(example_inputs), rtol)
    except RuntimeError as error:
        return f"the model does not run in float64: {error}"


def doubled(inputs: Any) -> Any:
    """Inputs with every floating-point tensor in containers as float64."""
    return _mapped(inputs, lambda t: t.double() if t.is_floating_point() else t)


def copied(inputs: Any) -> Any:
    """Inputs with every tensor in containers as a copy: a model may write into what it is given."""
    return _mapped(inputs, torch.clone)


def _mapped(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        return {key: _mapped(value, change) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(_mapped(value, change) for value in inputs))
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_mapped(value, change) for value in inputs)
    return inputs
