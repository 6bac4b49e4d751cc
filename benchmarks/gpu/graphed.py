"""A training step that is captured in a CUDA graph once and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

#: Steps that run as they are before one is captured: kernels are chosen, and the optimizer's state is made.
WARM_UP = 3


class Graphed:
    """Calls a step; on CUDA it captures it after a few calls and replays the graph.

    The step reads and writes tensors that stay where they are, and takes no decision on the host but those that
    ``key`` tells. Every call is one step, captured or not: the calls after a change of the key run the step as it is,
    then it is captured (which runs nothing), then it is replayed. Call it on a stream of its own, as a capture wants.

    Args:
        step: the step.
        generators: of random numbers on the device that the step draws. They may be seeded anew before every call.
        enabled: off, every call runs the step as it is.
    """

    def __init__(
        self, step: Callable[[], None], generators: Sequence[torch.Generator] = (), enabled: bool = True
    ) -> None:
        self.step, self.generators, self.enabled = step, generators, enabled
        self.key: Hashable = None
        self.calls = 0
        self.graph: Any = None

    def __call__(self, key: Hashable = None) -> None:
        """Takes a step.

        Args:
            key: all that the step's code depends on and that may change (learning rates, shapes, phases).
        """
        if key != self.key:
            self.forget()
            self.key = key
        if not self.enabled or self.calls < WARM_UP:
            self.step()
            self.calls += 1
            return
        if self.graph is None:
            self.graph = self.capture()
        self.graph.replay()

    def forget(self) -> None:
        """Lets go of the graph and its memory; the next calls warm up again."""
        self.key, self.calls, self.graph = None, 0, None

    def capture(self) -> Any:
        """A graph of the step; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self.step()
        return graph
