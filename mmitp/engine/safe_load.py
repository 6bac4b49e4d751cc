"""Files of tensors read as data: verified by their checksums, and no code of theirs is ever run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import IO, Any

import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import torch
from mmengine.dist import get_rank, is_distributed
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

__all__ = ["data_only", "load_data", "replaced", "saved_bytes"]

# Pickled as getattr(class, name): the statistics of logged histories, the curves of one-cycle schedules.
_METHODS: dict[Any, tuple[str, ...]] = {
    HistoryBuffer: ("min", "max", "current", "mean"),
    OneCycleParamScheduler: ("_annealing_cos", "_annealing_linear"),
}
_TORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def _method(owner: Any, name: Any) -> Any:
    """All of ``getattr`` that a checkpoint of mmengine needs; the real one would reach any object from any other."""
    if not isinstance(owner, type) or name not in _METHODS.get(owner, ()):
        raise pickle.UnpicklingError("Unsupported global: GLOBAL builtins.getattr was not an allowed global")
    return getattr(owner, name)


def _known_globals() -> list[Any]:
    """What mmengine's own checkpoints hold beside tensors: logged histories, schedules, and NumPy's arrays and numbers.

    NumPy's functions go by two names: NumPy 2 has renamed their module.
    """
    core = np._core if hasattr(np, "_core") else np.core
    names = ("numpy._core.multiarray", "numpy.core.multiarray")
    functions = [(getattr(core.multiarray, f), f"{name}.{f}") for name in names for f in ("_reconstruct", "scalar")]
    kinds = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFDSU"}
    return [*_METHODS, np.ndarray, np.dtype, slice, *kinds, *functions, (_method, "builtins.getattr")]


@contextlib.contextmanager
def _allowed() -> Iterator[None]:
    if _TORCH < (2, 6):  # cannot be told of single functions; such files want --trust there
        yield
        return
    with torch.serialization.safe_globals(_known_globals()):
        yield


def load_data(file: str | os.PathLike[str] | IO[bytes], map_location: Any = None, trust: bool = False) -> Any:
    """``torch.load`` for data only, and only undamaged data.

    Every record of a file in torch's format (a ZIP archive since torch 1.6) is compared with its CRC-32, which
    ``torch.load`` itself does not look at.

    Args:
        file: path, or a stream that can seek.
        map_location: as in ``torch.load``.
        trust: unpickle whatever there is, which may run any code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, no file of torch's, or holds more than data; the latter with the names of the
            classes and functions that it wants.
    """
    name = getattr(file, "name", "the checkpoint") if hasattr(file, "read") else os.fspath(file)
    _verify(file, name)
    try:
        with _allowed():
            return torch.load(file, map_location=map_location, weights_only=not trust)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        if wanted := _wanted(error):
            raise ValueError(
                f"{name} is not loaded: it is more than data. It wants {wanted}, and what it would make of that may "
                "run code. Nothing of it was run. With --trust it is loaded all the same: for files of people you "
                "trust" + ("" if _TORCH >= (2, 6) else f" (torch {torch.__version__}: 2.6 knows more as harmless)")
            ) from error
        raise ValueError(_damaged(name, error)) from error
    except Exception as error:  # bytes of anybody's: torch and its unpickler raise all kinds
        if (
            isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
            or trust
            and not isinstance(error, (EOFError, RuntimeError, ValueError, KeyError))
        ):
            raise
        raise ValueError(_damaged(name, error)) from error


def _damaged(name: str, error: Exception) -> str:
    said = "" if isinstance(error, KeyError) else str(error)  # of a byte that is no instruction its number
    said = re.sub(r"Weights only load failed\..*", "it does not begin as one", said, flags=re.DOTALL)
    reason = re.split(r"[.] |\n", said)[0]
    return f"{name} is not a checkpoint, or a damaged one: {reason or 'it does not begin as one'}"


def _wanted(error: Exception) -> str:
    """The name of the class or function that torch has refused."""
    found = re.search(r"GLOBAL ([\w.]+[\w])", str(error))
    return "" if found is None else repr(found[1])


def _verify(file: Any, name: str) -> None:
    """Compares all records with their checksums.

    Raises:
        ValueError: one differs, or the archive is cut off.
    """
    stream = hasattr(file, "read")
    start = file.tell() if stream else 0
    if not stream and os.path.isdir(file):
        raise ValueError(f"{name} is a folder, not a checkpoint")
    with contextlib.nullcontext(file) if stream else open(file, "rb") as opened:
        head = opened.read(4)
        opened.seek(start)
        if not head:
            raise ValueError(f"{name} is not a checkpoint, or a damaged one: it is empty")
        if head == b"PK\x03\x04":  # torch's older format has no checksums
            try:
                with zipfile.ZipFile(opened) as archive:
                    broken = archive.testzip()
            except Exception as error:  # bytes of anybody's
                raise ValueError(_damaged(name, error)) from error
            if broken is not None:
                raise ValueError(
                    f"{name} is not a checkpoint, or a damaged one: the checksum of its record {broken!r} does not fit"
                )
        if stream:
            opened.seek(start)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute exchanged for a while."""
    former = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, former)


@contextlib.contextmanager
def data_only(trust: bool = False) -> Iterator[None]:
    """Meanwhile everything that mmengine loads, from files or from the network, goes through :func:`load_data`."""

    def load(file: Any, map_location: Any = None, *_: Any, **__: Any) -> Any:
        return load_data(file, map_location, trust)

    def load_url(url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True) -> Any:
        return load_data(_fetched(url, model_dir, progress), map_location, trust)

    with contextlib.ExitStack() as stack:
        if hasattr(mmengine_checkpoint, "_safe_torch_load"):  # it falls back to running the code
            stack.enter_context(replaced(mmengine_checkpoint, "_safe_torch_load", load))
        else:  # mmengine 0.10.7 and before
            stack.enter_context(replaced(mmengine_checkpoint, "torch", _view_of_torch(load)))
        stack.enter_context(replaced(mmengine_checkpoint, "load_url", load_url))
        yield


def _view_of_torch(load: Callable[..., Any]) -> ModuleType:
    view = ModuleType("torch")  # torch as one module sees it
    vars(view).update(load=load, __getattr__=lambda name: getattr(torch, name))
    return view


def _fetched(url: str, model_dir: str | None, progress: bool) -> str:
    """The file of a URL in torch's cache, as ``torch.hub`` keeps it; one process of each machine downloads."""
    folder = model_dir or os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, os.path.basename(url.split("?")[0]))
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=progress and not (is_distributed() and get_rank()))
    return path


def saved_bytes(content: Any) -> memoryview:
    """What ``torch.save`` writes, checksums included."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()
