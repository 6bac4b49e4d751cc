"""Files that are there whole or not at all, and names of folders. Only the standard library is imported here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["told_apart", "write_whole"]


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview | str, durable: bool = True) -> None:
    """Writes a file that is there complete or, if the process or the machine stops, not at all.

    It is written under another name beside (``NAME.part``), flushed to the disk and renamed. Its folder is made.

    Args:
        path: the file; a former one of the name is replaced.
        content: bytes, or text, which is written as UTF-8 with the line ends it has.
        durable: wait until the disk has it; without, only a stop of the machine can leave it torn.

    Raises:
        OSError: the disk is full, and the like, with the file's name; nothing is left then, and a former file of the
            name is unchanged.
    """
    path = os.path.abspath(path)
    folder, part = os.path.dirname(path), f"{path}.part"
    os.makedirs(folder, exist_ok=True)
    try:
        with open(part, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise OSError(error.errno, error.strerror, path) from error
    if durable and os.name == "posix":  # the new name, too, is on the disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def told_apart(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A short name for each folder: its own, with those above it where others are called so too.

    Raises:
        ValueError: one folder is given twice.

    Example:
        >>> told_apart(["first/pruned", "second/pruned", "second/dense"])
        ['first/pruned', 'second/pruned', 'dense']
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    for place, folder in zip(parts, folders, strict=True):
        if parts.count(place) > 1:
            raise ValueError(f"{folder} is given twice: give every folder once")
    names = []
    for place in parts:
        depth = 1
        while sum(other[-depth:] == place[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(place[-depth:]))
    return names
