"""What training loops and networks of users do to the pruner: closures, training-only branches, hooks of their own,
sizes besides the example's, masks that were frozen before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmitp.pruning import InTrainPruner, MacBudget, freeze_masks, mask_model, masked_layers, randomize_masks, slim
from mmitp.pruning.masks import MaskBank
from mmitp.pruning.verify import difference

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three 1x1 convolutions, and a function of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.aux = nn.Conv2d(16, 4, 1)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def features(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x).relu()).relu()


def straight(net: Any, x: Tensor) -> Tensor:
    return net.c(features(net, x))


def started(run: Callable[[Any, Tensor], Any] = straight, **options: Any) -> tuple[Net, Any, InTrainPruner]:
    net = mask_model(Net(run), exclude=["aux"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    pruner = InTrainPruner(net, X, **{"target": 0.5, "steps": 12, **options})
    pruner.attach(optimizer)
    return net, optimizer, pruner


def loop(net: nn.Module, optimizer: Any, steps: int, way: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        if way == "plain":
            closure()
            optimizer.step()
        elif way == "keyword":
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)
            optimizer.zero_grad()  # as Lightning may do: the next step finds no gradient before its closure


@pytest.mark.parametrize("way", ["closure", "keyword"])
@pytest.mark.parametrize("options", [{}, dict(push="fisher"), dict(b=20.0, push="plain")], ids=str)
def test_a_step_by_closure_is_a_step(way: str, options: dict[str, Any]) -> None:
    runs = []
    for each in ("plain", way):
        net, optimizer, pruner = started(**options)
        pruner.active = True
        loop(net, optimizer, 12, each)
        runs.append((net.state_dict(), pruner.state_dict()["significance"]))
    for name, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][name]), name
    if "b" not in options:
        assert float(runs[0][1]["mean_square"].sum()) > 0
        assert torch.equal(runs[0][1]["mean_square"], runs[1][1]["mean_square"])


def test_an_optimizer_that_calls_its_closure_often_is_followed_too() -> None:
    net = mask_model(Net(straight), exclude=["aux"])
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    pruner = InTrainPruner(net, X, target=0.5, steps=4)
    pruner.attach(optimizer)
    pruner.active = True
    loop(net, optimizer, 4, "closure")
    assert pruner.ratio() <= 0.5
    assert float(pruner.significance.mean_square.sum()) > 0


def test_an_optimizer_whose_history_is_one_vector_goes_on_with_the_small_network() -> None:
    net = mask_model(Net(straight), exclude=["aux"])
    optimizer, told = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3), []
    pruner = InTrainPruner(net, X, target=0.5, steps=4, warn=told.append)
    pruner.attach(optimizer)
    pruner.active = True
    loop(net, optimizer, 4, "closure")
    pruner.freeze()
    pruner.slim(optimizer)
    assert "starts anew" in told[0]
    loop(net, optimizer, 2, "closure")
    assert all(p.isfinite().all() for p in net.parameters())


def test_the_live_network_is_checked_at_every_size_that_the_pruner_knows() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        h = features(net, x)
        return net.c(h * h.shape[1] ** -0.5 if x.shape[-1] > 8 else h)

    big = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    net, optimizer, pruner = started(run, more_examples=[big])
    net.b.prune_mask.data[:8] = net.c.prune_mask.data[:8] = -1
    pruner.freeze()
    masked = copy.deepcopy(net)
    for example in (X, big):
        assert difference(masked, pruner.slim(), example) == ""
    pruner.slim(optimizer)
    for example in (X, big):
        assert difference(masked, net, example) == ""


@pytest.mark.parametrize("branch", ["layer", "loss"])
def test_what_only_training_computes_is_not_broken_silently(branch: str) -> None:
    def run(net: Any, x: Tensor) -> Any:
        h = features(net, x)
        out = net.c(h)
        if not net.training:
            return out
        return out, net.aux(h) if branch == "layer" else h.square().mean()

    net, optimizer, pruner = started(run)
    net.c.prune_mask.data[:8] = -1
    pruner.freeze()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="does not train the same once slimmed"):
        pruner.slim(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    net(torch.randn(4, 3, 8, 8))  # trains on under the masks
    assert difference(net, pruner.slim(), X) == ""


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda net, x: net.c(F.dropout(features(net, x), 0.5, net.training)), id="random"),
        pytest.param(lambda net, x: dict(loss=net.c(features(net, x)), target=x.sum()), id="a dict"),
        pytest.param(lambda net, x: 1 / 0 if net.training else net.c(features(net, x)), id="needs targets"),
    ],
)
def test_training_that_cannot_be_compared_is_no_reason_to_refuse(run: Any) -> None:
    net, optimizer, pruner = started(run)
    pruner.freeze()
    pruner.slim(optimizer)
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in Net(run).parameters())


def test_a_users_hook_that_changes_a_layers_output_is_part_of_the_network() -> None:
    net = Net(straight)
    net.b.register_forward_hook(lambda module, args, out: out - out.mean(1, keepdim=True))
    mask_model(net, exclude=["aux"])
    assert "mean mixes channels" in MacBudget(net, X).unfollowed.values()
    randomize_masks(net, 0.5, torch.Generator().manual_seed(0))
    assert difference(net, slim(net, X), X) == ""


@pytest.mark.parametrize("write", [lambda x: x.sub_(0.5), lambda x: x.sub_(0.5).div_(0.25)], ids=["sub", "div"])
def test_a_model_that_writes_into_its_input_leaves_the_example_alone(write: Any) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        write(x)
        return straight(net, x)

    example = X.clone()
    net = mask_model(Net(run), example_inputs=example)
    pruner = InTrainPruner(net, example, target=0.5, steps=4)
    assert pruner.budget.unfollowed == {}
    pruner.freeze()
    assert pruner.slim().a.out_channels < 16
    assert torch.equal(example, X)


def frozen_at(net: nn.Module, ratio: float) -> None:
    other = copy.deepcopy(net)
    pruner = InTrainPruner(other, X, target=ratio, steps=4)
    pruner.freeze()
    net.load_state_dict(other.state_dict())


def test_masks_frozen_above_the_target_are_told_of() -> None:
    net = mask_model(Net(straight), exclude=["aux"])
    frozen_at(net, 0.5)
    told: list[str] = []
    pruner = InTrainPruner(net, X, target=0.3, steps=4, warn=told.append)
    assert len(told) == 1
    assert "above the target 0.3" in told[0]
    assert pruner.frozen
    InTrainPruner(net, X, target=0.6, steps=4, warn=told.append)
    assert len(told) == 1


@pytest.mark.parametrize("how", ["loaded", "by hand"])
def test_a_pattern_that_is_frozen_already_stays(how: str) -> None:
    net, _, pruner = started(target=0.6)
    if how == "loaded":
        frozen_at(net, 0.3)
    else:
        freeze_masks(net, {name: torch.arange(len(m.prune_mask)) < 2 for name, m in masked_layers(net).items()})
    before = pruner.ratio()
    assert before < 0.4
    report = pruner.freeze()
    assert (report.ratio, report.switched_on, report.switched_off) == (before, 0, 0)
    assert pruner.frozen


def test_a_plain_copy_carries_no_hooks() -> None:
    net, _, pruner = started()
    for small in (pruner.slim(), slim(copy.deepcopy(net), X)):
        hooks = [
            call
            for module in small.modules()
            for call in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ]
        assert not any(isinstance(getattr(call, "__self__", None), MaskBank) for call in hooks)
        assert not hooks
    assert len(net._forward_hooks) == 1  # the model itself trains on with them


def test_figures_after_the_live_network_was_slimmed_are_its_last_ones() -> None:
    _, optimizer, pruner = started()
    report = pruner.freeze()
    pruner.slim(optimizer)
    assert pruner.ratio() == pruner.report().ratio == report.ratio
    with pytest.raises(ValueError, match="was slimmed"):
        pruner.hw_loss()


def test_a_network_slimmed_before_its_freeze_leaves_a_pruner_at_rest() -> None:
    told: list[str] = []
    _, optimizer, pruner = started()
    pruner.warn = told.append
    pruner.active = True
    pruner.slim(optimizer)
    assert [text[:60] for text in told] == ["the network is slimmed at 1.0000 of the operations, above th"]
    pruner.step()
    assert pruner.frozen
    assert pruner.freeze().ratio == pruner.ratio() == 1.0
    assert pruner.state_dict()["frozen"]
    pruner.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks  # there is nothing left to follow for


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by type, without an optimizer's attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def test_the_optimizer_in_a_wrapper_is_followed() -> None:
    net, optimizer, pruner = started()
    pruner.detach()
    with pytest.raises(ValueError, match="takes a torch optimizer, got NoneType"):
        pruner.attach(None)  # type: ignore[arg-type]
    pruner.attach(Wrapper(optimizer))
    pruner.active = True
    loop(net, optimizer, 12, "plain")
    assert pruner.position == 12
    assert pruner.ratio() <= 0.5


def test_masks_in_half_precision_are_told_of() -> None:
    told: list[str] = []
    x = X.bfloat16()
    InTrainPruner(mask_model(Net(straight).bfloat16(), exclude=["aux"]), x, target=0.5, steps=4, warn=told.append)
    assert told == []
    InTrainPruner(mask_model(Net(straight), exclude=["aux"]).bfloat16(), x, target=0.5, steps=4, warn=told.append)
    assert len(told) == 1
    assert "masks are torch.bfloat16" in told[0]


def test_a_second_optimizer_is_refused() -> None:
    _, optimizer, pruner = started()
    with pytest.raises(ValueError, match=r"detach\(\) it first"):
        pruner.attach(optimizer)
    pruner.detach()
    pruner.attach(optimizer)


def test_a_second_pruner_of_the_same_masks_is_refused_until_the_first_is_done() -> None:
    net, optimizer, first = started()
    second = InTrainPruner(net, X, target=0.4, steps=4)
    with pytest.raises(ValueError, match="another pruner of the same masks"):
        second.attach(optimizer)
    first.detach()
    second.attach(optimizer)
    second.freeze()
    first.attach(optimizer)


def test_a_freeze_of_masks_that_never_trained_is_told_of() -> None:
    told: list[str] = []
    _, _, pruner = started()
    pruner.warn = told.append
    pruner.freeze()
    assert len(told) == 1
    assert "no step of the window was seen" in told[0]


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a dictionary, got NoneType"):
        started()[2].load_state_dict(None)  # type: ignore[arg-type]


def test_a_budget_has_to_be_the_models_and_of_the_cost_asked_for() -> None:
    net = mask_model(Net(straight), exclude=["aux"])
    budget = MacBudget(net, X)
    with pytest.raises(ValueError, match="cost='params' is asked for besides"):
        InTrainPruner(net, X, target=0.5, steps=4, budget=budget, cost="params")
    with pytest.raises(ValueError, match="another model"):
        InTrainPruner(copy.deepcopy(net), X, target=0.5, steps=4, budget=budget)
    with pytest.raises(ValueError, match="must be a MacBudget"):
        InTrainPruner(net, X, target=0.5, steps=4, budget=5)  # type: ignore[arg-type]


def test_a_cut_network_that_bears_no_narrower_tensor_keeps_their_widths() -> None:
    """The first cut suits the network's code, the second does not: a shape with two numbers of channels in it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.v, self.d, self.e = (nn.Conv2d(n, m, 1) for n, m in ((3, 16), (16, 16), (16, 16), (16, 4)))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            n, c, height, width = h.shape
            return self.e(h + self.d(self.v(h).flatten(2).softmax(1).reshape(n, c, height, width)))

    net = mask_model(Attention())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner = InTrainPruner(net, X, target=0.6, steps=30, slim_every=3, min_keep=0.0)
    pruner.attach(optimizer)
    pruner.active = True
    cuts = []
    for step in range(30):
        if step == 2:
            net.d.prune_mask.data[:4] = -5
        if step == 12:
            net.v.prune_mask.data[:4] = -5
            net.e.prune_mask.data[:4] = -5
        optimizer.zero_grad()
        net(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        before, ratio = pruner.budget.whole_tensors, pruner.ratio()
        if pruner.cut(optimizer):
            cuts.append((before, pruner.budget.whole_tensors))
            assert pruner.ratio() == ratio
    assert (False, False) in cuts
    assert (False, True) in cuts
    pruner.freeze()
    masked = copy.deepcopy(net)
    assert difference(masked, pruner.slim(), X) == ""
    pruner.slim(optimizer)
    assert difference(masked, net, X) == ""


def test_cutting_that_begins_at_a_resume_waits_for_its_steps() -> None:
    net, optimizer, pruner = started(steps=30)
    pruner.active = True
    loop(net, optimizer, 20, "plain")
    state, weights = pruner.state_dict(), copy.deepcopy(net.state_dict())
    net, optimizer, pruner = started(steps=30, slim_every=5)
    pruner.load_state_dict(state)
    net.load_state_dict(weights)
    pruner.active = True
    assert pruner.cut(optimizer) == 0
    loop(net, optimizer, 6, "plain")
    assert pruner.cut(optimizer) > 0


def test_a_pruner_that_goes_back_forgets_what_it_forecast() -> None:
    net, optimizer, pruner = started(b=5.0, push="plain", steps=40)
    pruner.active = True
    loop(net, optimizer, 3, "plain")
    state = copy.deepcopy(pruner.state_dict())
    loop(net, optimizer, 10, "plain")
    pruner.load_state_dict(state)
    assert pruner.state_dict()["forecast"] == state["forecast"]
