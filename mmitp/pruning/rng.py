"""Random numbers drawn on the side: a check or a recording leaves the training's sequence of them as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def kept_rng(seed: int | None = None) -> Iterator[None]:
    """Gives every global generator its state back at the end: Python's, numpy's, torch's CPU and accelerators'.

    Not ``torch.random.fork_rng`` with ``torch.manual_seed``: the latter seeds all devices, also those that the former
    was not told of, and devices that nobody has used yet.

    Args:
        seed: for all of them, inside; by default they go on from where they stand.
    """
    accelerators = _accelerators()
    states: list[Any] = [accelerator.get_rng_state_all() for accelerator in accelerators]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    host = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one is what a model may draw from
            torch.default_generator.manual_seed(seed)
            for accelerator in accelerators:
                accelerator.manual_seed_all(seed)
            if mps is not None:
                torch.mps.manual_seed(seed)
        yield
    finally:
        random.setstate(host[0])
        np.random.set_state(host[1])  # noqa: NPY002
        torch.set_rng_state(host[2])
        for accelerator, state in zip(accelerators, states, strict=True):
            accelerator.set_rng_state_all(state)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _accelerators() -> list[Any]:
    """The device modules whose generators are in use: asking an idle one would start its runtime on every device."""
    modules = (torch.cuda, getattr(torch, "xpu", None))
    return [module for module in modules if module is not None and module.is_initialized()]
