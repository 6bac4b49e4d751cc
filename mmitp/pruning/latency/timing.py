"""Clocks, and the times of calls that take turns."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: A single timing takes at least this long; shorter calls are repeated within it.
_LEAST_NS = 300_000

#: The timed calls of :func:`times_for_a_while` take about so long, in 3 to 100 rounds.
_WHILE_NS = 3e9


def processor(device: torch.device | str) -> str:
    """What a device is called, to tell whose times a table holds; empty for a device this machine does not have."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock_of(device: torch.device) -> Callable[[], int]:
    """What tells the time in ns, once a device has done what it was given.

    Raises:
        ValueError: torch cannot wait for such a device: its kernels would be timed as they are queued.
    """
    if device.type == "cuda":

        def synchronized() -> int:
            torch.cuda.synchronize(device)
            return time.perf_counter_ns()

        return synchronized
    if device.type != "cpu":
        wait = getattr(getattr(torch, device.type, None), "synchronize", None)
        if wait is None:
            raise ValueError(f"nothing can be timed on {device}: this torch has no torch.{device.type}.synchronize")

        def waited() -> int:
            wait()
            return time.perf_counter_ns()

        return waited
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns


def least_times(calls: Sequence[Callable[[], Any]], clock: Callable[[], int], rounds: int) -> list[float]:
    """Least time of each call in ns."""
    return times_in_turn(calls, clock, rounds).amin(0).tolist()


def times_in_turn(calls: Sequence[Callable[[], Any]], clock: Callable[[], int], rounds: int) -> Tensor:
    """Times in ns, ``(rounds, calls)``: the calls take turns, so that slow moments of the machine hit all alike.

    A call pays for what the one before has left in caches and allocator, most behind the largest network. So an untimed
    call goes before each timing, and every round has an order of its own.
    """
    repeats = []
    for call in calls:
        call()
        start = clock()
        call()
        repeats.append(max(1, round(_LEAST_NS / max(clock() - start, 1))))
    times = torch.empty(rounds, len(calls), dtype=torch.float64)
    orders = torch.Generator().manual_seed(0)
    for row in times:
        for i in torch.randperm(len(calls), generator=orders).tolist():
            call, n = calls[i], repeats[i]
            call()
            start = clock()
            for _ in range(n):
                call()
            row[i] = (clock() - start) / n
    return times


def times_for_a_while(
    calls: Sequence[Callable[[], Any]], device: torch.device, number: int | None, rounds: int | None = None
) -> Tensor:
    """:func:`times_in_turn` on a device with so many of torch's threads; rounds for some seconds by default."""
    with torch_threads(number):
        clock = clock_of(device)
        if rounds is None:
            rounds = max(3, min(100, int(_WHILE_NS / float(times_in_turn(calls, clock, 1).sum()))))
        return times_in_turn(calls, clock, rounds)
