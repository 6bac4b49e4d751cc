"""The budget on nets small enough to count by hand, its gradient, and its agreement with independent counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from mmitp.pruning import MacBudget, mask_model, masked_layers, slim
from mmitp.pruning.check import check_slimming
from mmitp.pruning.graph import channelwise
from mmitp.pruning.graph.ops import HANDLERS
from mmitp.pruning.graph_check import opened

STE = 0.2099871708  # dM_b/dM at M = 1


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def point(i: int, o: int, **kw: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 1, **kw)


def off(model: nn.Module, **channels: list[int]) -> None:
    """Switches mask entries off, by layer."""
    with torch.no_grad():
        for name, entries in channels.items():
            masked_layers(model)[name].prune_mask.view(-1)[entries] = -1.0


def kept(budget: MacBudget) -> dict[str, int]:
    return {row.name: row.macs_kept for row in budget.table()}


def gradients(model: nn.Module, budget: MacBudget) -> dict[str, list[float]]:
    """Gradient of the kept MACs (not of the ratio), straight-through derivative taken out, rounded to MACs."""
    model.zero_grad()
    (budget.ratio() * budget.dense_macs).backward()
    return {
        name: (layer.prune_mask.grad / (0.5 * (1 - torch.tanh(layer.prune_mask) ** 2)))
        .flatten()
        .round(decimals=2)
        .tolist()
        for name, layer in masked_layers(model).items()
    }


def test_a_chain_of_two_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), point(4, 6))
    mask_model(net)
    budget = MacBudget(net, torch.randn(1, 3, 8, 8))
    # 3*3*64*3*4 = 6912 and 64*4*6 = 1536
    assert budget.dense_macs == 8448
    assert budget.ratio().item() == 1.0
    off(net, **{"2": [0, 2, 3]})
    assert kept(budget) == {"0": 1728, "2": 384}
    assert budget.kept_macs() == 2112
    assert budget.ratio().item() == 2112 / 8448
    assert budget.ratio().dtype == torch.float64
    assert budget.ratio().dim() == 0
    # every channel saves 3*3*64*3 in the stem and 64*6 here, on or off
    assert gradients(net, budget) == {"2": [2112.0] * 4}


def test_gradient_of_the_ratio_is_the_saving_over_dense_macs_times_the_straight_through_derivative() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), point(4, 6)))
    budget = MacBudget(net, torch.randn(1, 3, 8, 8))
    budget.hw_loss(0.5).backward()
    assert net[1].prune_mask.grad.tolist() == pytest.approx([2112 / 8448 * STE] * 4)


def test_the_hinge_has_no_gradient_at_the_target() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), point(4, 6)))
    budget = MacBudget(net, torch.randn(1, 3, 8, 8))
    off(net, **{"1": [1, 2]})
    assert budget.hw_loss(0.4).item() == pytest.approx(0.1)
    loss = budget.hw_loss(0.6)
    loss.backward()
    assert loss.item() == 0
    assert net[1].prune_mask.grad.tolist() == [0] * 4
    for target in (0, 1.2, -1):
        with pytest.raises(ValueError, match="target must be a fraction"):
            budget.hw_loss(target)


def test_a_stream_with_two_readers_saves_only_what_the_last_reader_drops() -> None:
    net = Net(lambda m, x: m.last((h := m.stem(x)) + m.inner(h)), stem=point(3, 4), inner=point(4, 4), last=point(4, 2))
    mask_model(net)
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    assert kept(budget) == {"stem": 48, "inner": 64, "last": 32}
    off(net, last=[0])
    # the stem still serves the inner layer with channel 0; the inner layer need not compute it
    assert kept(budget) == {"stem": 48, "inner": 48, "last": 24}
    assert gradients(net, budget) == {
        # an input costs 4*3 here; channel 0 has no other reader, so the stem's 3*4 goes with it
        "inner": [24.0, 12.0, 12.0, 12.0],
        # an input costs 4*2 here and the inner layer's output 4*4; the stem's stays with the inner layer
        "last": [24.0, 24.0, 24.0, 24.0],
    }
    off(net, inner=[1])
    # an inner output costs 4*3 now, and channel 1 of the stem has the last layer alone: 3*4 more
    assert gradients(net, budget)["last"] == [8.0 + 12, 8.0 + 12 + 12, 8.0 + 12, 8.0 + 12]


def test_concatenation_counts_each_part_with_its_own_channels() -> None:
    net = Net(lambda m, x: m.r(torch.cat([m.p(x), m.q(x)], 1)), p=point(3, 2), q=point(3, 3), r=point(5, 4))
    mask_model(net)
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    off(net, r=[0, 2, 4])
    assert kept(budget) == {"p": 4 * 3 * 1, "q": 4 * 3 * 1, "r": 4 * 2 * 4}
    off(net, r=[0, 1, 2, 4])
    assert kept(budget) == {"p": 0, "q": 12, "r": 16}


def test_depthwise_lives_with_its_reader() -> None:
    net = nn.Sequential(point(3, 4), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), point(4, 5))
    mask_model(net)
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    assert kept(budget) == {"0": 48, "1": 144, "3": 80}
    off(net, **{"3": [1, 3]})
    assert kept(budget) == {"0": 24, "1": 72, "3": 40}
    assert gradients(net, budget) == {"3": [12.0 + 36 + 20] * 4}


def test_a_group_lives_while_one_of_its_outputs_is_read() -> None:
    net = nn.Sequential(point(3, 4), point(4, 6, groups=2), point(6, 5))
    mask_model(net)
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    assert kept(budget) == {"0": 48, "1": 48, "2": 120}
    off(net, **{"2": [0, 1]})
    assert kept(budget) == {"0": 48, "1": 48, "2": 80}
    off(net, **{"2": [0, 1, 2]})
    assert kept(budget) == {"0": 24, "1": 24, "2": 60}
    assert [(row.in_kept, row.out_kept) for row in budget.table()] == [(3, 2), (2, 3), (3, 5)]
    # the second group (outputs 3 to 5) has three readers: none alone; the first group comes back with any of its own
    assert gradients(net, budget) == {"2": [20.0 + 24 + 24] * 3 + [20.0] * 3}


def test_transposed_convolution_counts_its_input_size() -> None:
    net = mask_model(nn.Sequential(point(3, 4), nn.ConvTranspose2d(4, 2, 4, 2, 1), point(2, 2)))
    budget = MacBudget(net, torch.randn(1, 3, 3, 5))
    assert kept(budget) == {"0": 15 * 12, "1": 16 * 15 * 8, "2": 60 * 4}
    off(net, **{"1": [0], "2": [1]})
    assert kept(budget) == {"0": 15 * 9, "1": 16 * 15 * 3, "2": 60 * 2}


def test_linear_after_flatten_reads_blocks_of_features() -> None:
    net = mask_model(nn.Sequential(point(3, 2), nn.Flatten(), nn.Linear(8, 5)), linear=True)
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    off(net, **{"2": [0, 1, 2]})  # one place of channel 0 is still read
    assert kept(budget) == {"0": 24, "2": 25}
    off(net, **{"2": [3]})
    assert kept(budget) == {"0": 12, "2": 20}


def test_a_dense_linear_layer_reads_everything() -> None:
    net = mask_model(nn.Sequential(point(3, 2), point(2, 2), nn.Flatten(), nn.Linear(8, 5)))
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    off(net, **{"1": [0]})
    assert kept(budget) == {"0": 12, "1": 8, "3": 40}
    assert {row.name: row.note for row in budget.table()} == {"0": "dense", "1": "", "3": "dense"}


def test_a_shared_head_counts_every_level_under_one_mask() -> None:
    net = Net(
        lambda m, x: [m.head(h := m.stem(x)), m.head(F.max_pool2d(h, 2))],
        stem=point(3, 4),
        head=point(4, 3),
    )
    mask_model(net)
    budget = MacBudget(net, torch.randn(1, 3, 4, 4))
    assert kept(budget) == {"stem": 16 * 12, "head": (16 + 4) * 12}
    off(net, head=[3])
    assert kept(budget) == {"stem": 16 * 9, "head": 20 * 9}


def test_batch_and_unbatched_inputs() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2, 2)))
    one = MacBudget(net, torch.randn(1, 3, 6, 6)).dense_macs
    assert one == 9 * 16 * 12 + 4 * 16 * 16
    assert MacBudget(net, torch.randn(3, 3, 6, 6)).dense_macs == 3 * one
    assert MacBudget(net, torch.randn(3, 6, 6)).dense_macs == one


def test_inputs_come_as_tensor_tuple_or_dict() -> None:
    net = mask_model(Net(lambda m, x: m.b(m.a(x)), a=point(3, 4), b=point(4, 4)))
    x = torch.randn(1, 3, 2, 2)
    assert {MacBudget(net, inputs).dense_macs for inputs in (x, (x,), {"x": x})} == {112}


def test_weight_granularity_counts_single_weights() -> None:
    net = mask_model(nn.Sequential(point(3, 4), nn.Conv2d(4, 2, 3, padding=1)), granularity="weight")
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    assert kept(budget) == {"0": 48, "1": 288}
    off(net, **{"1": list(range(10))})
    assert kept(budget) == {"0": 48, "1": 4 * 62}
    assert budget.table()[1].note == "62 of 72 weights kept"
    assert gradients(net, budget) == {"1": [4.0] * 72}
    small = slim(net, torch.randn(1, 3, 2, 2), budget)
    assert (small[1].weight == 0).sum() == 10


def test_frozen_masks_get_no_gradient_and_their_pattern_counts() -> None:
    net = mask_model(nn.Sequential(point(3, 4), point(4, 4), point(4, 4)))
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    off(net, **{"1": [0]})
    net[1].freeze_mask()
    with torch.no_grad():
        net[1].prune_mask.fill_(1.0)
    assert kept(budget)["1"] == 4 * 3 * 4
    budget.ratio().backward()
    assert net[1].prune_mask.grad.tolist() == [0] * 4
    assert min(net[2].prune_mask.grad.tolist()) > 0
    net[2].freeze_mask()
    net.zero_grad()
    budget.ratio().backward()
    assert net[2].prune_mask.grad.tolist() == [0] * 4


def test_the_cheapest_ratio_is_one_input_channel_a_layer() -> None:
    net = mask_model(nn.Sequential(point(3, 4), point(4, 4), point(4, 4)))
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    assert budget.min_ratio() == pytest.approx((3 + 1 + 4) / (12 + 16 + 16))
    off(net, **{"1": [0, 1, 2, 3], "2": [0, 1, 2, 3]})  # the guard leaves one each
    assert budget.ratio().item() == budget.min_ratio()


def test_a_model_without_masks_is_counted_and_cannot_shrink() -> None:
    budget = MacBudget(nn.Sequential(point(3, 4), nn.Linear(2, 5)), torch.randn(1, 3, 2, 2))
    assert budget.dense_macs == budget.kept_macs() == 48 + 8 * 10
    assert budget.ratio().item() == budget.min_ratio() == 1.0


def test_masks_that_never_run_leave_an_empty_pattern_that_every_figure_takes() -> None:
    net = mask_model(Net(lambda m, x: m.a(x), a=point(3, 4), auxiliary=point(4, 4)))
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    pattern = budget.flat_pattern()
    assert pattern.shape == budget.marginal_costs().shape == budget.hw_gradient(0.5).shape == (0,)
    assert budget.macs_of(pattern) == budget.kept_macs() == budget.kept_cost() == 48
    assert budget.split(pattern) == {}
    assert [row.macs_kept for row in budget.table()] == [48]


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="ran no convolution or linear layer"):
        MacBudget(nn.ReLU(), torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match="returned no tensor"):
        MacBudget(Net(lambda m, x: str(m.a(x).shape), a=point(3, 3)), torch.randn(1, 3, 2, 2))


def test_layers_outside_of_the_recorded_pass_are_listed() -> None:
    net = mask_model(Net(lambda m, x: m.a(x), a=point(4, 3), auxiliary=point(4, 3)))
    assert "did not run" in MacBudget(net, torch.randn(1, 4, 2, 2)).unfollowed["auxiliary"]


def test_recording_leaves_modes_hooks_and_buffers_alone() -> None:
    net = mask_model(nn.Sequential(point(3, 4), nn.BatchNorm2d(4), point(4, 4)))
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random_state = torch.get_rng_state()
    MacBudget(net, torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in net] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_flat_binarisation_agrees_with_the_layers() -> None:
    net = mask_model(nn.Sequential(point(3, 4), point(4, 7), point(7, 5)))
    budget = MacBudget(net, torch.randn(1, 3, 2, 2))
    for values in (torch.randn(11), torch.full((11,), -1.0), torch.zeros(11), -torch.rand(11).round()):
        for name, part in budget.split(values).items():
            with torch.no_grad():
                masked_layers(net)[name].prune_mask.copy_(part)
        assert torch.equal(budget.binarize(budget.flat_masks().detach()), budget.flat_pattern())


def fvcore_macs(model: nn.Module, x: Tensor) -> int:
    analysis = FlopCountAnalysis(model.eval(), x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = analysis.by_operator()
    return int(sum(by_operator[op] for op in ("conv", "linear", "matmul", "addmm")))


def test_fvcore_counts_the_same_before_and_after_slimming() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, 2),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    x = torch.randn(1, 3, 8, 8)
    mask_model(net, linear=True)
    budget = MacBudget(net, x)
    assert budget.dense_macs == fvcore_macs(net, x)
    off(net, **{"4": [0, 5], "5": [1], "8": [0, 1, 2, 3, 9], "10": [0, 1, 2]})
    assert budget.kept_macs() == fvcore_macs(slim(net, x, budget), x) < budget.dense_macs


class Hidden(nn.Module):
    """``a`` is read through ``mix`` by a branch that starts closed, and by ``r`` alone otherwise."""

    def __init__(self, mix: Callable[[Tensor], Tensor], start: float) -> None:
        super().__init__()
        self.stem, self.a, self.o, self.r = point(3, 8), point(8, 8), point(8, 4), point(8, 4)
        self.norm = nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.weight, start)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(F.relu(self.stem(x)))
        return self.r(y) + self.norm(self.o(self.mix(y)))


@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_the_check_sees_through_layers_that_start_closed(start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # flip mistaken for an operation that treats channels one by one
    monkeypatch.setitem(HANDLERS, "flip", channelwise)
    net = mask_model(Hidden(lambda y: y.flip(1), start))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    budget = MacBudget(net, torch.randn(2, 3, 4, 4))
    assert budget.unfollowed == {"a": "its outputs are read in a way the channel graph did not see"}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "op",
    [
        lambda m, y, t: y.clamp(min=t),
        lambda m, y, t: y.clip(max=t),
        lambda m, y, t: torch.clamp_max(y, t),
        lambda m, y, t: torch.where(y > 0, t, y),
        lambda m, y, t: torch.fmax(y, t),
    ],
)
def test_a_tensor_argument_is_read_channel_by_channel(op: Callable[..., Tensor]) -> None:
    net = mask_model(
        Net(lambda m, x: [m.o(op(m, m.s(x), t := m.t(x))), m.r(t)], s=point(3, 8), t=point(3, 8), o=point(8, 4),
            r=point(8, 4)),
        exclude=["s", "t"],
    )  # fmt: skip
    budget = MacBudget(net, torch.randn(1, 3, 4, 4), check=False)
    off(net, o=[0, 1], r=[0, 2])
    # only channel 0 of t is read by neither; s lacks what o drops
    assert {row.name: row.out_kept for row in budget.table()} == {"s": 6, "t": 7, "o": 4, "r": 4}


class BySize(nn.Module):
    """Large images, and batches, take a path of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.far = point(3, 8), point(8, 8), point(8, 4), point(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x))))
        z = self.c(y)
        if x.shape[-1] > 4:
            z = z + y.mean(1, keepdim=True)
        return z + self.far(y) if len(x) > 1 else z


def by_size() -> BySize:
    net = mask_model(BySize().eval())
    off(net, b=[0, 1], c=[0, 1, 2], far=[2])
    return net


#: name -> further example, and how many channels of ``b`` it leaves: all are averaged, or all but one are read
FURTHER = {"size": (torch.randn(1, 3, 8, 8), 8), "batch": (torch.randn(2, 3, 4, 4), 7)}


@pytest.mark.parametrize("name", FURTHER)
def test_more_examples_keep_what_any_of_them_needs(name: str) -> None:
    (more, left), x, net = FURTHER[name], torch.randn(1, 3, 4, 4), by_size()
    budget = MacBudget(net, x, more_examples=[more])
    assert budget.dense_macs == 16 * (3 * 8 + 8 * 8 + 8 * 4)  # of the first example alone
    assert {r.name: r.out_kept for r in budget.table()}["b"] == left
    small = slim(net, x, budget, more_examples=[more])
    for example in (x, more):
        torch.testing.assert_close(small(example), net(example), rtol=1e-5, atol=1e-6)
    assert check_slimming(by_size(), x, more_examples=[more]).passed


def test_one_example_shows_one_path_and_another_one_is_compared() -> None:
    net, x = by_size(), torch.randn(1, 3, 4, 4)
    budget = MacBudget(net, x)
    assert {r.name: r.out_kept for r in budget.table()}["b"] == 5
    with pytest.raises(RuntimeError, match="does not compute what the masked one does"):
        slim(net, x, budget, more_examples=[FURTHER["size"][0]])


def test_a_module_that_runs_again_on_what_it_fed_keeps_all_that_is_read() -> None:
    """``mid`` reads the depthwise layer and feeds it: its outputs are needed by ``last`` through a layer before it."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.deep(net.stem(x))
        return net.last(net.deep(net.mid(y).relu()))

    deep = point(4, 4, groups=4)
    net = mask_model(Net(run, stem=point(3, 4), deep=deep, mid=point(4, 4), last=point(4, 2)))
    budget = MacBudget(net, torch.randn(1, 3, 1, 1))
    # deep runs twice, 4 each
    assert kept(budget) == {"stem": 12, "deep": 8, "mid": 16, "last": 8}
    off(net, last=[1])
    assert kept(budget) == {"stem": 12, "deep": 8, "mid": 16, "last": 6}  # mid still reads deep's channel 1
    off(net, mid=[1])
    assert kept(budget) == {"stem": 9, "deep": 6, "mid": 9, "last": 6}


def test_single_weights_of_layers_with_one_channel_are_counted() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3)), granularity="weight", include=["0", "1"])
    budget = MacBudget(net, torch.randn(1, 1, 5, 5))
    assert kept(budget) == {"0": 9 * 9 * 4, "1": 9 * 4}
    off(net, **{"0": [0, 1, 2], "1": [5]})
    assert kept(budget) == {"0": 9 * 33, "1": 35}


def test_a_tensor_that_starts_closed_in_part_is_opened_there_and_nowhere_else() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.0, 1.0, 0.5, 0.0]))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with opened(net):
        weight = net[0].weight
        assert weight[[1, 2]].tolist() == [1.0, 0.5]
        assert bool((weight[[0, 3]] >= 0.2).all())
        assert bool((net[0].bias >= 0.2).all())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_head_that_no_proposal_reaches_under_the_pattern_is_no_obstacle() -> None:
    """As in Mask R-CNN: with channels missing the detector finds nothing, and the mask head computes on nothing."""

    def run(net: Net, x: Tensor) -> Any:
        x = net.body(net.stem(x).relu())
        found = int(all(bool(layer.prune_pattern.all()) for layer in masked_layers(net).values()))
        return x, net.last(net.head(x[:found]).relu())

    net = Net(run, stem=nn.Conv2d(3, 8, 3), body=point(8, 8), head=point(8, 8), last=point(8, 2))
    mask_model(net)
    budget = MacBudget(net, torch.randn(1, 3, 8, 8))
    assert "depends on the data" in next(record for record in budget.layers if record.name == "head").note
    off(net, body=[0, 1], last=[2])
    small = slim(net, torch.randn(1, 3, 8, 8), budget)
    assert (small.stem.out_channels, small.head.out_channels) == (6, 7)


def test_masks_without_values_are_refused_by_name() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).to("meta"))
    with pytest.raises(ValueError, match="the mask of '1' is on the meta device"):
        MacBudget(net, torch.empty(1, 3, 5, 5, device="meta"))
