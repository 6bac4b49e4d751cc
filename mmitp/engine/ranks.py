"""A process of a distributed run that stops answering ends the run within a known time, and by its name.

The time-out of collective operations (``env_cfg.dist_cfg.timeout``, seconds) ends the waiting. Who was waited for is
told by signs of life, which every process leaves in the store that all of them met at.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from mmengine import Config
from mmengine.dist import get_rank, get_world_size, is_distributed
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmitp.values import is_number

__all__ = ["TIMEOUT", "bound_waiting", "watched"]

#: Seconds that a process waits for another, unless the config says otherwise.
TIMEOUT = 600


def bound_waiting(cfg: Config) -> None:
    """Gives a distributed run's config :data:`TIMEOUT`, unless it has a time-out of its own.

    Raises:
        ValueError: its own is no positive number of seconds.
    """
    if cfg.get("launcher", "none") == "none":
        return
    cfg.setdefault("env_cfg", {})
    cfg.env_cfg.setdefault("dist_cfg", {"backend": "nccl"})
    cfg.env_cfg.dist_cfg.setdefault("timeout", TIMEOUT)
    seconds = cfg.env_cfg.dist_cfg.timeout
    if not (is_number(seconds) and seconds > 0):
        raise ValueError(f"env_cfg.dist_cfg.timeout must be a positive number of seconds, got {seconds!r}")


@contextlib.contextmanager
def watched(runner: Runner) -> Iterator[None]:
    """Meanwhile an error of several processes' common work names those that did not answer.

    Where the backend ends the process by itself (NCCL), the log has their names before.

    Raises:
        RuntimeError: in place of the backend's, where some do not answer or are behind.
    """
    if not is_distributed() or get_world_size() == 1:
        yield
        return
    signs = _SignsOfLife(runner, _timeout(runner))
    signs.start()
    try:
        yield
    except RuntimeError as error:
        if missing := signs.missing():
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"{missing}: rank {get_rank()} has waited for as long as env_cfg.dist_cfg.timeout allows "
                f"({signs.timeout:g} s), or was cut off. The run ends; --resume goes on from its last checkpoint "
                f"({reason})"
            ) from error
        raise
    finally:
        signs.stop()


def _timeout(runner: Runner) -> float:
    return float(runner.cfg.get("env_cfg", {}).get("dist_cfg", {}).get("timeout", TIMEOUT))


class _SignsOfLife:
    """This process's sign of life, renewed by a thread, and those of the others.

    Args:
        runner: whose iterations are told.
        timeout: of collective operations, seconds. At three quarters of it without an iteration the log says who is
            missing.
    """

    def __init__(self, runner: Runner, timeout: float) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        self._runner, self.timeout = runner, timeout
        self._store: Any = _get_default_store()
        self._every = min(max(timeout / 40, 0.1), 5.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="mmitp-signs-of-life")

    def start(self) -> None:
        """Begins to give signs."""
        self._thread.start()

    def stop(self) -> None:
        """Gives no more."""
        self._ended.set()

    def missing(self) -> str:
        """Who does not answer, or else who is behind; nothing where all others are as far as this one.

        Takes some renewals' time.
        """
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._compare()), daemon=True)
        asking.start()
        asking.join(20 * self._every + 2)
        return found[0] if found else "rank 0, at which all processes met, does not answer"

    def _compare(self) -> str:
        try:
            first = self._signs()
            time.sleep(4 * self._every)
            second = self._signs()
        except RuntimeError:  # the store has gone with the process that kept it
            return "rank 0, at which all processes met, does not answer"
        others = [rank for rank in range(get_world_size()) if rank != get_rank()]
        if silent := [rank for rank in others if first[rank] == second[rank]]:
            return "; ".join(f"rank {rank} does not answer ({_when(second[rank])})" for rank in silent)
        here = self._iteration()
        behind = [rank for rank in others if (there := second[rank]) is not None and there[1] < here]
        return "; ".join(f"rank {rank} is behind ({_when(second[rank])}, here {here})" for rank in behind)

    def _signs(self) -> list[tuple[int, int] | None]:
        """Of each rank, its number of signs and of iterations; ``None`` where there never was one."""
        found: list[tuple[int, int] | None] = []
        for rank in range(get_world_size()):
            if not self._store.check([_key(rank)]):
                found.append(None)
                continue
            count, iteration = self._store.get(_key(rank)).decode().split()
            found.append((int(count), int(iteration)))
        return found

    def _iteration(self) -> int:
        loop = self._runner._train_loop
        return int(getattr(loop, "iter", 0))

    def _beat(self) -> None:
        count, iteration, since, said = 0, -1, time.monotonic(), False
        while not self._ended.wait(self._every):
            count += 1
            now = self._iteration()
            if now != iteration:
                iteration, since, said = now, time.monotonic(), False
            try:
                self._store.set(_key(get_rank()), f"{count} {now}")
            except RuntimeError:
                return  # the store has gone; the collective operations say so too
            if not said and time.monotonic() - since > 0.75 * self.timeout:
                said = True
                if missing := self.missing():
                    print_log(f"rank {get_rank()} waits: {missing}", logger="current", level=logging.ERROR)


def _key(rank: int) -> str:
    return f"mmitp_signs_of_life_{rank}"


def _when(sign: tuple[int, int] | None) -> str:
    return "never heard of" if sign is None else f"iterations done: {sign[1]}"
