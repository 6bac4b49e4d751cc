"""A CUDA graph made of operations on the CPU: what one step ran, run again on the same memory.

``torch.cuda.graph`` records the kernels that a step launches, with the addresses that they read and write. Its Python
runs no more: what a replay does not do on the device is not done. Here operations are recorded with their tensors, and
a replay writes into the tensors of the record. Whatever would need a value on the host, or a shape that depends on one,
is refused, as it is while a stream is being captured. Unlike a stream in capture, a recorded step also runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_REFUSED = frozenset(
    """_local_scalar_dense equal nonzero _unique2 unique_dim unique_consecutive masked_select bincount""".split()
)


class NotCapturable(AssertionError):
    """An operation that the host would have to wait for."""


class Captured(TorchDispatchMode):
    """Records what runs while it is entered; :meth:`replay` runs it again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in _REFUSED or any(i is not None and i.dtype == torch.bool for i in indices):
            raise NotCapturable(name)
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for then, now in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(then, Tensor) and then.untyped_storage()._cdata != now.untyped_storage()._cdata:
                    then.copy_(now)
