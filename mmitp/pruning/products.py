"""Counts the products of a forward pass by what they are: at torch's dispatcher, where every spelling ends.

``x @ w``, ``F.linear``, ``einsum`` and a scripted function all come down to a handful of operators. Counted are
convolutions, whatever their weight was computed from, and matrix products in which at least one factor does not depend
on the model's input: a parameter, a buffer, a constant, or what was computed of them alone. Products of two activations
(attention's ``q k^T``) have no weight whose rows a mask could remove, and are left out. An elementwise multiplication
with a sum after it is elementwise work and left out too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One counted product.

    Attributes:
        macs: multiply-accumulates.
        n_in: length of the sum.
        n_out: columns (channels) it gives.
    """

    macs: int
    n_in: int
    n_out: int


@dataclass(frozen=True)
class _Factors:
    """The factors of a candidate product; ``always``: counted whatever they depend on."""

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    product: Product
    always: bool = False


def _matrix(first: int) -> Callable[[Sequence[Any], Any], list[_Factors]]:
    """Products of the arguments ``first`` and ``first + 1``: matrices, batches of them, vectors."""

    def factors(args: Sequence[Any], out: Any) -> list[_Factors]:
        a, b = args[first], args[first + 1]
        columns = b.shape[-1] if b.dim() > 1 else 1
        return [_Factors([a], [b], Product(a.numel() * columns, a.shape[-1], columns))]

    return factors


def _convolution(args: Sequence[Any], out: Any) -> list[_Factors]:
    x, weight, transposed = args[0], args[1], bool(args[6])
    fixed = x if transposed else out
    positions = fixed.numel() // fixed.shape[1]
    return [_Factors([x], [weight], Product(weight.numel() * positions, x.shape[1], out.shape[1]), always=True)]


def _trilinear(args: Sequence[Any], out: Any) -> list[_Factors]:
    """``F.bilinear``: (N, 1, I), (1, O, I, J) and (N, 1, J) after the expansion; one of the three is the weight."""
    x, weight, y = args[:3]
    rows = x.numel() // x.shape[-1] if x.dim() else 1
    return [_Factors([x, y], [weight], Product(rows * weight.numel(), x.shape[-1], out.shape[-1]))]


def _attention(args: Sequence[Any], out: Any) -> list[_Factors]:
    """Two products, of query and key and of their weights and the value: (N, heads, length, width) each."""
    query, key, value = args[:3]
    rows, length = query.numel() // query.shape[-1], key.shape[-2]
    return [
        _Factors([query], [key], Product(rows * length * query.shape[-1], query.shape[-1], length)),
        _Factors([query, key], [value], Product(rows * length * value.shape[-1], length, value.shape[-1])),
    ]


def _fused_rnn(args: Sequence[Any], out: Any) -> list[_Factors]:
    """Every weight matrix of a recurrent layer multiplies once a position and direction."""
    x = args[0]
    matrices = [w for w in _tensors(args[1:6]) if w.dim() == 2 and not w.is_complex()]
    rows = x.numel() // x.shape[-1]
    return [_Factors([x], matrices, Product(rows * sum(w.numel() for w in matrices), x.shape[-1], out[0].shape[-1]))]


def _mkldnn_rnn(args: Sequence[Any], out: Any) -> list[_Factors]:
    return _fused_rnn([args[0], *args[1:3]], out)


def _cudnn_rnn(args: Sequence[Any], out: Any) -> list[_Factors]:
    return _fused_rnn([args[0], args[1]], out)


_PRODUCTS: dict[Any, Callable[[Sequence[Any], Any], list[_Factors]]] = {
    getattr(aten, name): factors
    for names, factors in (
        ("mm bmm mv dot vdot _int_mm _scaled_mm", _matrix(0)),
        ("addmm baddbmm addbmm addmv _addmm_activation", _matrix(1)),
        ("convolution _convolution convolution_overrideable", _convolution),
        ("_trilinear", _trilinear),
        ("mkldnn_rnn_layer", _mkldnn_rnn),
        ("_cudnn_rnn", _cudnn_rnn),
        (
            "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
            _attention,
        ),
    )
    for name in names.split()
    if hasattr(aten, name)
}

#: Words of operator names that tell of a product. Such an operator is named as not counted.
_TELLING = frozenset(
    """mm addmm bmm baddbmm matmul linear conv conv1d conv2d conv3d convolution rnn lstm gru cdist attention solve
    einsum""".split()
)


def _tensors(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, (list, tuple)):
        for item in obj:
            yield from _tensors(item)
    elif isinstance(obj, dict):
        yield from _tensors(list(obj.values()))


class ProductCounter(TorchDispatchMode):
    """Notes the products that count while it is on.

    Args:
        inputs: the tensors whose values the pass depends on (the model's input).

    Attributes:
        products: what was counted since the last :meth:`take`.
        unknown: operators that multiply by a weight and are not counted, since the last :meth:`take_unknown`.
        paused: whether operators are let through unseen: they are none of the model's.
    """

    def __init__(self, inputs: Iterator[Tensor] | Sequence[Tensor]) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.unknown: list[str] = []
        self.paused = False
        # By storage, so that views and what is written through them are seen; a weak reference keeps its key unique.
        self._dependent: dict[int, StorageWeakRef] = {}
        self._without_storage: dict[int, Tensor] = {}
        self._read: dict[int, StorageWeakRef] = {}
        for tensor in inputs:
            self._touch(tensor)

    def take(self) -> list[Product]:
        """The products counted since the last call."""
        taken, self.products = self.products, []
        return taken

    def take_unknown(self) -> list[str]:
        """The operators that are not counted, since the last call."""
        taken, self.unknown = self.unknown, []
        return taken

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the input."""
        storage = _storage(tensor)
        return id(tensor) in self._without_storage if storage is None else storage._cdata in self._dependent

    def was_read(self, tensor: Tensor) -> bool:
        """Whether any operator of the pass has read the values of a tensor."""
        storage = _storage(tensor)
        return storage is None or storage._cdata in self._read

    def _touch(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage is None:
            self._without_storage[id(tensor)] = tensor
        elif storage._cdata not in self._dependent:
            self._dependent[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        factors = _PRODUCTS.get(getattr(func, "_overloadpacket", None))
        if factors is None and isinstance(func, torch._ops.OpOverload):
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        operands = list(_tensors((args, kwargs)))
        dependent = [t for t in operands if self.depends(t)]
        if not _is_view(func):
            for t in operands:
                storage = _storage(t)
                if storage is not None and storage._cdata not in self._read:
                    self._read[storage._cdata] = StorageWeakRef(storage)
        if factors is not None:
            for f in factors(args, out):
                if f.always or not (any(map(self.depends, f.a)) and any(map(self.depends, f.b))):
                    self.products.append(f.product)
        elif dependent and len(dependent) < len(operands) and self._multiplies(func, operands):
            self.unknown.append(str(func).removesuffix(".default").replace(".", "::", 1))
        if dependent:
            for t in _tensors(out):
                self._touch(t)
            for t in _written(func, args, kwargs):
                self._touch(t)
        return out

    def _multiplies(self, func: Any, operands: list[Tensor]) -> bool:
        """Whether an unknown operator may be a product with a weight: by its name, or as a foreign one given a matrix.

        Pointwise operators of torch say that they are.
        """
        name = getattr(getattr(func, "_overloadpacket", func), "__name__", str(func))
        weights = [t for t in operands if not self.depends(t) and (t.is_floating_point() or t.is_complex())]
        if getattr(func, "namespace", "aten") not in ("aten", "prim", "prims"):
            return any(sum(s > 1 for s in t.shape) > 1 for t in weights)
        return bool(weights) and not _TELLING.isdisjoint(name.strip("_").split("_"))


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors and their like have none
        return None


def _is_view(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for argument, value in zip(schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(value)
    for argument in schema.arguments:
        if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(kwargs[argument.name])


@contextmanager
def unfused() -> Iterator[None]:
    """Without torch's fused transformer layers, single operators that hide their products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
