"""Result files: valid JSON that says what it was measured with, written at once or not at all, never over another.

:func:`check_writable` goes before the hours of work, :func:`write_results` after them. Only the standard library is
imported here: tensors and arrays are known by what they can do.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmitp

__all__ = ["check_writable", "free_name", "keep_inputs", "plain", "provenance", "write_results"]

#: bytes that a trial writes: as many as a result file has as a rule
_TRIED = 64 * 1024
_MODULES = ("numpy", "torch", "torchvision", "mmengine", "mmcv", "mmdet", "mmpretrain")


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Makes the folder of a result file and tries to write there.

    Raises:
        ValueError: the path is a folder, or nothing can be written in its folder (a full disk included).
    """
    path = _with_folder(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}.") as file:
            file.write(bytes(_TRIED))  # an empty file can be made on a full disk too
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def keep_inputs(path: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Refuses to write over a file that is read.

    Args:
        path: what is to be written.
        inputs: files, and names that are none (URLs, packaged configs).

    Raises:
        ValueError: it is one of them, under whatever name.
    """
    for given in inputs:
        if given is not None and os.path.exists(path) and os.path.exists(given) and os.path.samefile(path, given):
            raise ValueError(f"{path} is the input {given} and would be written over: give another name to write to")


def _with_folder(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file for the results")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> ValueError:
    where = f" ({error.filename})" if error.filename else ""
    return ValueError(f"results cannot be written to {path}: {error.strerror}{where}")


def free_name(path: str | os.PathLike[str]) -> Path:
    """``name_2.json``, ``name_3.json``, ...: the first that does not exist."""
    path = Path(path)
    number = 2
    while (free := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    return free


def plain(value: Any, where: str = "", lost: dict[str, str] | None = None) -> Any:
    """A value as JSON has it: tensors and arrays as (lists of) numbers, NaN and infinities as ``None``.

    Args:
        value: numbers, strings, paths, tensors, arrays, and mappings and sequences of them; of anything else its text.
        where: the value's name, for ``lost``.
        lost: takes the names of the numbers that are not finite, and what they were.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        names = [(str(key), item) for key, item in value.items()]
        return {name: plain(item, f"{where}.{name}" if where else name, lost) for name, item in names}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, f"{where}[{index}]", lost) for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy's and torch's numbers are arrays too
        return plain(value.tolist(), where, lost)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if lost is not None:
            lost[where] = str(float(value))
        return None
    return str(value)


def provenance(
    *,
    config: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | None = None,
    images: int | None = None,
    seed: int | None = None,
    slimmed: bool | None = None,
    command: Sequence[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a result was measured with.

    Args:
        config: its name or path.
        checkpoint: path of the weights; their SHA-256 goes along where they are a file.
        device: where the network ran.
        images: how many were tested.
        seed: of the run.
        slimmed: whether the network of the config is a slimmed one (``mmitp.SlimModel``).
        command: by default this process's command line.
        more: anything else worth knowing.

    Returns:
        These, without those that are ``None``, and the versions of Python, mmitp and the libraries in use.
    """
    known: dict[str, Any] = dict(
        config=None if config is None else str(config),
        checkpoint=None if checkpoint is None else str(checkpoint),
        checkpoint_sha256=sha256(checkpoint) if checkpoint is not None and os.path.isfile(checkpoint) else None,
        device=device,
        images=images,
        seed=seed,
        slimmed=slimmed,
        **more,
        command=list(sys.argv if command is None else command),
    )
    versions = {"python": platform.python_version(), "mmitp": mmitp.__version__}
    for name in _MODULES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            versions[name] = str(version)
    return {key: value for key, value in known.items() if value is not None} | {"versions": versions}


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_results(path: str | os.PathLike[str], figures: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Writes figures and, under ``run``, what they were measured with (see :func:`provenance`).

    The file appears whole or not at all. Where one of its name exists, that one is moved to :func:`free_name`, so the
    newest is always found under the name that was asked for.

    Returns:
        What there is to say to the user, a line each: the file's name, a former file's new one, figures that are NaN or
        infinite and stand as ``null`` (``run.not_finite`` has what they were).

    Raises:
        ValueError: the path is a folder, or its folder cannot be made.
        OSError: the disk is full, and the like, with the file's name.
    """
    assert "run" not in figures
    path = _with_folder(path)
    lost: dict[str, str] = {}
    content = plain(figures, lost=lost)
    content["run"] = plain(run) | ({"not_finite": lost} if lost else {})
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"

    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are the owner's alone
        moved = _publish(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    lines = [f"wrote {path}"]
    if moved is not None:
        lines.append(f"the former {path.name} is now {moved}")
    if lost:
        named = ", ".join(f"{name} ({value})" for name, value in list(lost.items())[:5])
        lines.append(f"not finite, null in the file: {named}" + (f" and {len(lost) - 5} more" if len(lost) > 5 else ""))
    return lines


def set_aside(path: Path) -> Path | None:
    """Moves an existing file to :func:`free_name` and returns that; ``None`` where there is no such file."""
    while path.exists():
        free = free_name(path)
        try:
            os.close(os.open(free, os.O_CREAT | os.O_EXCL))  # ours, whoever else looks for a name
            os.replace(path, free)
        except FileExistsError:
            continue
        except FileNotFoundError:  # another process has moved it meanwhile
            free.unlink()
            break
        return free
    return None


def _publish(temporary: str, path: Path) -> Path | None:
    """Gives a finished file its name and returns where a former file of that name has gone."""
    moved = None
    while True:
        moved = set_aside(path) or moved
        try:
            os.link(temporary, path)  # unlike a rename, fails if another process has been faster
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        return moved


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
