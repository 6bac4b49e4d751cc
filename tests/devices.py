"""A GPU made of labels: finds, on the CPU, what CUDA would refuse and what would make the host wait for it.

torch computes on ``cpu:0`` as on ``cpu``, and yet takes them for two devices. Here ``cpu:0`` plays the GPU: a tensor
made or moved there, and all that is computed from it, is labelled so; factories without ``device=`` make tensors of the
host. Every tensor tells its label as its ``device``. Then

- an operation that mixes the two is a :class:`DeviceMismatch` that names operation and place (as on CUDA, numbers
  without dimensions, copies, and indices of the host are allowed);
- whatever makes the host wait for the GPU is listed with its place: values read (``item``, ``tolist``, ``bool``),
  shapes that depend on values (``nonzero``, boolean indices, ``unique``), and copies between the two.

What it cannot see: generators of the wrong device. Tensors made before, unpickled, or made by torch for itself have no
label and fit to everything.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmengine.runner
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, HOST = torch.device("cpu", 0), torch.device("cpu")

_FACTORIES = (
    "arange empty eye full linspace ones rand randint randn randperm scalar_tensor zeros "
    "empty_like full_like ones_like rand_like randn_like zeros_like new_empty new_full new_ones new_zeros"
).split()
_COPIES = {"copy_", "_to_copy", "lift_fresh", "_foreach_copy_"}
# Elsewhere CUDA takes a tensor of the host for a number if it has no dimensions.
_NO_NUMBERS = {"cat", "stack", "scatter", "scatter_", "scatter_reduce_", "gather", "index_select", "index_add_"}
_VALUES = {"_local_scalar_dense", "equal"}
_SHAPES = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount"}
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}

_HERE = Path(__file__).resolve()
_OURS = (str(_HERE.parents[1] / "mmitp"), str(_HERE.parent))
_STACK = ("/mmengine/", "/mmdet/", "/mmpretrain/", "/mmcv/")


class DeviceMismatch(AssertionError):
    """An operation on a tensor of the host and one of the GPU."""


class LogicalGpu(TorchDispatchMode):
    """While it is entered, ``cpu:0`` is a GPU, and a Runner's model goes there by itself.

    Attributes:
        device: the GPU, for ``device=`` and ``.to``.
        syncs: what the host has waited for: ``"kind, at place"`` -> how often.
        mismatches: the errors raised so far. Some code tries and catches: a test asks that there are none.
    """

    device = GPU

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.mismatches: list[str] = []
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> LogicalGpu:
        real = Tensor.device.__get__  # type: ignore[attr-defined]
        patch = self._patches.setattr
        patch(Tensor, "device", property(lambda x: _at(x) or real(x)), raising=False)
        patch(Tensor, "to", self._to(Tensor.to))
        patch(Tensor, "cpu", lambda x: x.to(HOST))
        for name in ("tolist", "numpy"):
            patch(Tensor, name, self._read(name, getattr(Tensor, name)))
        for name in _FACTORIES:
            owner = Tensor if name.startswith("new_") else torch
            patch(owner, name, self._make(getattr(owner, name)))
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (Tensor, "new_tensor")):
            patch(owner, name, self._make(getattr(owner, name), copies=True))
        patch(torch, "load", self._load(torch.load))
        patch(mmengine.runner.runner, "get_device", lambda: str(GPU))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.undo()

    # -- what torch does not dispatch

    def _to(self, to: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.device, Tensor))]
            target = (
                _at(found[0]) if found and isinstance(found[0], Tensor) else torch.device(found[0]) if found else None
            )

            def here(value: Any) -> Any:
                return HOST if isinstance(value, (str, torch.device)) else value

            out = to(x, *map(here, args), **{key: here(value) for key, value in kwargs.items()})
            if target is None or target == _at(x):
                return out
            if GPU in (target, _at(x)) and not kwargs.get("non_blocking", False):
                self._note("copy to the GPU" if target == GPU else "copy to the host")
            return _put(out.clone() if _storage(out) is _storage(x) else out, target)

        return moved

    def _read(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def values(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if _at(x) == GPU:
                if name == "numpy":
                    raise self._mismatch("numpy() of a tensor of the GPU")
                if x.dim():  # else it is dispatched as item()
                    self._note(name)
            return read(x, *args, **kwargs)

        return values

    def _make(self, make: Callable[..., Tensor], copies: bool = False) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            source = args[0] if args and isinstance(args[0], Tensor) else None
            device = kwargs.pop("device", None)
            out = make(*args, **kwargs)
            if source is not None and _storage(out) is _storage(source):  # as_tensor of a tensor
                return out if device is None else out.to(device)
            if device is not None:
                target: torch.device | None = torch.device(device)
            else:
                target = HOST if source is None else _at(source)
            if copies and target == GPU:
                self._note("copy to the GPU")
            return _put(out, target)

        return made

    @staticmethod
    def _load(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
            there = isinstance(map_location, (str, torch.device)) and torch.device(map_location) == GPU
            out = load(file, map_location="cpu" if there else map_location, **kwargs)
            for leaf in tree_leaves(out) if there else ():
                if isinstance(leaf, Tensor):
                    _put(leaf, GPU)
            return out

        return loaded

    # -- what it does

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        labels = [_at(tensor) for tensor in tensors]
        known = {id(_storage(tensor)): tensor for tensor in tensors}
        if GPU in labels:
            self._check(name, args, tensors, labels)
            self._count(name, args, tensors, labels)
        out = func(*args, **kwargs)
        target = self._label(name, kwargs, tensors, labels)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(_storage(tensor)) not in known and _at(tensor) is None:
                _put(tensor, target)
        return out

    def _check(self, name: str, args: tuple, tensors: list[Tensor], labels: list[torch.device | None]) -> None:
        if name in _COPIES:
            return
        hosts = [t for t, label in zip(tensors, labels, strict=True) if label == HOST]
        if name in _INDEXING and labels[0] == GPU:  # their indices may be of the host
            hosts = [args[2]] if len(args) > 2 and _at(args[2]) == HOST else []
        wrong = [t for t in hosts if t.dim() or name in _NO_NUMBERS]
        if wrong:
            shape = tuple(wrong[0].shape)
            raise self._mismatch(f"{name} mixes a tensor of the host, {shape}, with one of the GPU")

    def _count(self, name: str, args: tuple, tensors: list[Tensor], labels: list[torch.device | None]) -> None:
        if name in _VALUES and labels[0] == GPU:
            self._note("value read")
        elif name in _SHAPES or name == "repeat_interleave" and len(tensors) == 1:
            self._note(name)
        elif name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            number = name != "index" and isinstance(args[2], Tensor) and args[2].numel() == 1
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not number:
                self._note("boolean index")  # with one number for all it is masked_fill
            elif any(_at(index) == HOST for index in indices):
                self._note("copy to the GPU")
        elif name == "copy_" and HOST in labels and not args[2:]:
            self._note("copy to the GPU" if labels[0] == GPU else "copy to the host")

    @staticmethod
    def _label(
        name: str, kwargs: dict, tensors: list[Tensor], labels: list[torch.device | None]
    ) -> torch.device | None:
        if kwargs.get("device") == GPU:
            return GPU
        if GPU in labels:
            return GPU
        return HOST if HOST in labels else None  # factories that torch itself calls have no label

    def _mismatch(self, what: str) -> DeviceMismatch:
        self.mismatches.append(f"{what}, at {_place()}")
        return DeviceMismatch(self.mismatches[-1])

    def _note(self, kind: str) -> None:
        self.syncs[f"{kind}, at {_place()}"] += 1


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _at(tensor: Tensor) -> torch.device | None:
    # Python's storage object lives as long as the storage, whatever tensors look at it.
    return getattr(_storage(tensor), "logical_device", None)


def _put(tensor: Tensor, device: torch.device | None) -> Tensor:
    _storage(tensor).logical_device = device
    return tensor


def _frames() -> list[Any]:
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename != str(_HERE):
            found.append(frame)
        frame = frame.f_back
    return found


def _place() -> str:
    """Innermost line of this repository, and of the stack it was called from if that lies deeper."""
    frames = _frames()
    ours = next((f for f in frames if f.f_code.co_filename.startswith(_OURS)), None)
    stack = next((f for f in frames if any(part in f.f_code.co_filename for part in _STACK)), None)
    chosen = [frame for frame in frames if frame is ours or frame is stack]
    return " < ".join(
        f"{'/'.join(Path(f.f_code.co_filename).parts[-3:])}:{f.f_lineno} ({f.f_code.co_name})" for f in chosen
    )
