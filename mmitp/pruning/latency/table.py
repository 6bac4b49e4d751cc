"""What a latency table must look like: looked at before a run, not met as nonsense in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mmitp.values import is_count, is_number, is_size

#: What a latency table's file must say of itself.
TABLE_FORMAT = 1


def read_latency_table(path: str) -> dict[str, Any]:
    """Reads a file of ``mmitp profile``.

    Raises:
        ValueError: the file is no JSON.
        FileNotFoundError: there is no such file.
    """
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:  # no text, no JSON, brackets without end
            raise ValueError(f"{path} is no latency table, for it is no JSON: {error}") from error


def check_latency_table(table: Any, source: str) -> None:
    """Looks at a whole table, as ``mmitp profile`` writes it.

    Channel numbers rise from 1 or more to those of the layer, every layer has a time for each pair of them, and no time
    is negative.

    Args:
        table: read from JSON.
        source: the file's name, for the message.

    Raises:
        ValueError: with file and key.
    """

    def refuse(key: str, what: str, value: Any) -> None:
        shown = repr(value)
        raise ValueError(f"{source}: {key} must be {what}, got {shown if len(shown) < 80 else shown[:77] + '...'}")

    if not isinstance(table, Mapping) or table.get("format") != TABLE_FORMAT:
        raise ValueError(f"{source} is no latency table of format {TABLE_FORMAT} (mmitp profile writes one)")
    if not _is_time(table.get("constant")):
        refuse("constant", "a time in ns, finite and not negative", table.get("constant"))
    if not is_count(table.get("batch", 1)):
        refuse("batch", "a whole number of images, at least 1", table["batch"])
    if not is_count(table.get("threads", 1)):
        refuse("threads", "a whole number of threads, at least 1", table["threads"])
    if not is_size(table.get("shape", [1, 1])):
        refuse("shape", "two whole numbers of pixels (H, W)", table["shape"])
    for key in ("machine", "device"):
        if not isinstance(table.get(key, ""), str):
            refuse(key, "a name", table[key])
    layers = table.get("layers")
    if not isinstance(layers, Mapping) or not layers:
        refuse("layers", "a dictionary with at least one layer", layers)
    assert isinstance(layers, Mapping)
    for name, entry in layers.items():
        where = f"layers.{name if str(name).isprintable() else repr(name)}"
        if not isinstance(entry, Mapping):
            refuse(where, "a dictionary", entry)
        for key in ("inputs", "outputs"):
            axis = entry.get(key)
            if not isinstance(axis, list) or not axis or not all(map(is_count, axis)):
                refuse(f"{where}.{key}", "a list of whole numbers of channels, at least 1", axis)
            if any(a >= b for a, b in zip(axis, axis[1:], strict=False)):
                refuse(f"{where}.{key}", "rising numbers of channels", axis)
        rows, columns, times = len(entry["inputs"]), len(entry["outputs"]), entry.get("ns")
        if not isinstance(times, list) or len(times) != rows:
            refuse(f"{where}.ns", f"{rows} lists, one for each of 'inputs'", times)
        for row, line in enumerate(times):
            if not isinstance(line, list) or len(line) != columns or not all(map(_is_time, line)):
                refuse(f"{where}.ns[{row}]", f"{columns} times in ns, one for each of 'outputs', not negative", line)
        for key in ("gather", "scatter", "element"):
            if not _is_time(entry.get(key)):
                refuse(f"{where}.{key}", "a time in ns, finite and not negative", entry.get(key))
        n_in, n_out = entry.get("n_in"), entry.get("n_out")
        if not is_count(n_in) or n_in % entry["inputs"][-1]:
            refuse(f"{where}.n_in", "the last number of channels of 'inputs', or of its groups together", n_in)
        if not is_count(n_out) or n_out != entry["outputs"][-1]:
            refuse(f"{where}.n_out", "the last number of channels of 'outputs'", n_out)
        if not _is_time(entry.get("pair_macs")):
            refuse(f"{where}.pair_macs", "a number of operations, finite and not negative", entry.get("pair_macs"))


def _is_time(value: Any) -> bool:
    return is_number(value, 0)
