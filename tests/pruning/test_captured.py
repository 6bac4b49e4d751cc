"""The pruner's step in a captured graph and under ``torch.compile``: on the device alone, and the same as ever."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from small_chain import COSTS, chain

from mmitp.pruning import InTrainPruner, mask_model

STEPS = 24


class Loop:
    """A training step on a batch that stays at one place, as a captured graph needs it."""

    def __init__(self, b: Any, cost: str = "macs", captured: bool = False, steps: int = STEPS) -> None:
        torch.manual_seed(0)
        self.model = mask_model(chain())
        self.lr = torch.tensor(0.05)  # fused, and changed in place: SGD's other ways read it
        options: dict[str, Any] = dict(lr=self.lr, momentum=0.9, weight_decay=0.02, fused=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), **options)
        example = torch.zeros(1, 3, 12, 12)
        how: dict[str, Any] = dict(b=b, lr=0.05, steps=steps, cost=COSTS[cost](), min_keep=0.2)
        self.pruner = InTrainPruner(self.model, example, 0.4, **how)
        self.pruner.attach(self.optimizer, captured)
        self.pruner.active = True
        self.x, self.y = torch.empty(4, 3, 12, 12), torch.arange(4.0)
        self.generator = torch.Generator().manual_seed(1)

    def load(self) -> None:
        self.x.copy_(torch.randn(self.x.shape, generator=self.generator))
        self.lr.mul_(0.97)

    def step(self) -> None:
        self.optimizer.zero_grad()
        (self.model(self.x).mean((2, 3)) - self.y).square().mean().backward()
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        momentum = [entry["momentum_buffer"] for entry in self.optimizer.state.values()]
        return [t.detach().clone() for t in (*self.model.state_dict().values(), *momentum)]


@pytest.mark.parametrize("cost", ["macs", "latency", "params"])
@pytest.mark.parametrize("b", [30.0, "auto"])
def test_replayed_steps_are_eager_steps(captured: Any, b: Any, cost: str) -> None:
    """The whole of forward, backward, optimizer and pruner, bit for bit, and with it the frozen network."""
    eager, graphed = Loop(b, cost), Loop(b, cost, captured=True)
    ratios = []
    for _ in range(STEPS):
        eager.load()
        eager.step()
        ratios.append(eager.pruner.ratio())
    graph = captured.Captured()
    for step in range(STEPS):
        graphed.load()
        if step < 2:  # to warm up: what is made once is made here
            graphed.step()
        elif step == 2:
            with graph:
                graphed.step()
        else:
            graph.replay()
        graphed.pruner.advance()
    assert ratios[0] > ratios[-1]
    for expected, found in zip(eager.state(), graphed.state(), strict=True):
        assert torch.equal(expected, found)
    assert eager.pruner.count == graphed.pruner.count == STEPS
    assert eager.pruner.freeze() == graphed.pruner.freeze()


def test_a_loop_that_does_not_advance_is_told_so(captured: Any) -> None:
    loop = Loop("auto", captured=True)
    for _ in range(2):
        loop.load()
        loop.step()
    with pytest.raises(ValueError, match=r"advance\(\) once after every step.*made 2 steps.*called 0 times"):
        loop.pruner.freeze()


def test_a_captured_step_that_would_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    loop.load()
    with pytest.raises(ValueError, match=r"attach\(optimizer, captured=True\)"):
        loop.step()


def test_what_the_clock_says_reaches_a_captured_step(captured: Any) -> None:
    """The captured push is that of the new share of the saving that counts."""
    loop = Loop(30.0, "latency")
    budget = loop.pruner.budget
    with captured.Captured() as graph:
        push = budget.hw_gradient(0.4)
    before = push.clone()
    budget.cost.counted = 0.45  # type: ignore[union-attr]  # it was 0.9
    graph.replay()
    torch.testing.assert_close(push, before / 2)
    assert torch.equal(push, budget.hw_gradient(0.4))


@pytest.mark.parametrize(("b", "cost"), [(30.0, "latency"), (30.0, "params"), ("auto", "macs")])
def test_the_pruners_step_compiles_without_a_break(b: Any, cost: str) -> None:
    """Gradients, update and look, each equal to the same in eager mode."""
    eager, compiled = Loop(b, cost, captured=True), Loop(b, cost, captured=True)
    for loop in (eager, compiled):
        loop.load()
        loop.step()
        loop.pruner.advance()
        loop.pruner.detach()

    def update(loop: Loop) -> None:
        loop.pruner.take_gradients(loop.optimizer)
        loop.pruner.update()

    update(eager)
    torch.compile(update, backend="eager", fullgraph=True)(compiled)
    masks = [loop.pruner.budget.flat_masks() for loop in (eager, compiled)]
    assert torch.equal(*masks)
    if b == "auto":
        eager.pruner._look(12)
        torch.compile(compiled.pruner._look, backend="eager", fullgraph=True)(12)
        ratios = [loop.pruner.ratio() for loop in (eager, compiled)]
        assert ratios[0] == ratios[1] <= eager.pruner.path.wanted(12)  # type: ignore[union-attr]
        assert torch.equal(*[loop.pruner.budget.flat_masks() for loop in (eager, compiled)])


def test_masked_forward_and_loss_compile_while_the_pruner_follows() -> None:
    """A compiled model trains as the eager one, its masks too."""
    eager, compiled = Loop("auto"), Loop("auto")
    forward = torch.compile(compiled.model, backend="eager", fullgraph=True)
    for _ in range(6):
        for loop, model in ((eager, eager.model), (compiled, forward)):
            loop.load()
            loop.optimizer.zero_grad()
            (model(loop.x).mean((2, 3)) - loop.y).square().mean().backward()
            loop.optimizer.step()
    assert eager.pruner.ratio() < 1
    for expected, found in zip(eager.state(), compiled.state(), strict=True):
        torch.testing.assert_close(found, expected)
