"""One mask for all readers of a stream: one parameter everywhere, a narrower stream, nothing guessed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmitp.pruning import (
    InTrainPruner,
    MacBudget,
    freeze_masks,
    mask_model,
    masked_layers,
    project,
    randomize_masks,
    share_masks,
    slim,
)
from mmitp.pruning.check import check_slimming
from mmitp.pruning.divisor import Divisor
from mmitp.pruning.layers import ChannelPad
from mmitp.pruning.slim import SlimLayer


class Block(nn.Module):
    def __init__(self, c, inner):
        super().__init__()
        self.a, self.na = nn.Conv2d(c, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.b, self.nb = nn.Conv2d(inner, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))


def residual(c=6, inner=4):
    """Stem 3 -> c, two residual blocks, head c -> 2; 1x1 convolutions."""
    return nn.Sequential(nn.Conv2d(3, c, 1), Block(c, inner), Block(c, inner), nn.Conv2d(c, 2, 1))


@pytest.fixture
def shared():
    net = mask_model(residual())
    x = torch.randn(1, 3, 2, 2)
    assert share_masks(net, x) == [["1.a", "2.a", "3"]]
    return net, MacBudget(net, x), x


def test_readers_of_a_stream_hold_one_parameter(shared):
    net, budget, _ = shared
    layers = masked_layers(net)
    assert layers["1.a"].prune_mask is layers["2.a"].prune_mask is layers["3"].prune_mask
    assert [name for name, _ in budget.masked] == ["1.a", "1.b", "2.b"]
    assert budget.n_entries == 6 + 4 + 4
    assert len(list(net.parameters())) == len({id(p) for p in net.parameters()})
    other = copy.deepcopy(net)
    assert masked_layers(other)["1.a"].prune_mask is masked_layers(other)["3"].prune_mask


def test_macs_by_hand(shared):
    net, budget, _ = shared
    assert budget.dense_macs == 4 * (3 * 6 + 2 * (6 * 4 + 4 * 6) + 6 * 2)
    with torch.no_grad():
        masked_layers(net)["1.a"].prune_mask[:2] = -1.0  # the stream loses two of six
        masked_layers(net)["2.b"].prune_mask[0] = -1.0  # the second block's inside one of four
    assert budget.kept_macs() == 4 * (3 * 4 + (4 * 4 + 4 * 4) + (4 * 3 + 3 * 4) + 4 * 2)
    assert [(r.in_kept, r.out_kept) for r in budget.table()] == [(3, 4), (4, 4), (4, 4), (4, 3), (3, 4), (4, 2)]


def test_the_gradient_is_what_the_whole_stream_saves(shared):
    """No layer both reads and writes the stream, so the MACs are linear in each entry of its mask."""
    net, budget, _ = shared
    with torch.no_grad():
        masked_layers(net)["1.a"].prune_mask[3] = -1.0
        masked_layers(net)["1.b"].prune_mask[1] = -1.0
    pattern = budget.flat_pattern()
    saving = []
    for i in range(len(pattern)):
        on, off = pattern.clone(), pattern.clone()
        on[i], off[i] = True, False
        saving.append(budget.macs_of(on) - budget.macs_of(off))
    budget.ratio().backward()
    gradient = torch.cat([layer.prune_mask.grad for _, layer in budget.masked])
    ste = 0.5 * (1 - torch.tanh(budget.flat_masks().detach()) ** 2)
    torch.testing.assert_close(gradient / ste * budget.dense_macs, torch.tensor(saving, dtype=torch.float))
    # a stream channel: the stem's 3, what the blocks read and write of it with 3 and 4 inner channels, the head's 2
    assert saving[0] == 4 * (3 + 2 * 3 + 2 * 4 + 2)


def test_freeze_gives_every_reader_the_same_pattern_and_the_slim_network_no_gathers(shared, counted_macs):
    net, budget, x = shared
    with torch.no_grad():
        masked_layers(net)["3"].prune_mask.copy_(torch.tensor([0.6, 0.1, 0.5, 0.2, 0.4, 0.3]))
    result = project(budget, 0.7)
    freeze_masks(net, budget.split(result.pattern))
    layers = masked_layers(net)
    assert all(torch.equal(layers["1.a"].prune_pattern, layers[name].prune_pattern) for name in ("2.a", "3"))
    assert layers["3"].prune_pattern.tolist() == [1, 0, 1, 0, 1, 0] or budget.kept_macs() <= 0.7 * budget.dense_macs
    small = slim(net, x, budget)
    assert not any(isinstance(m, SlimLayer) for m in small.modules())
    assert counted_macs(small, x) == budget.kept_macs() == result.ratio * budget.dense_macs
    assert small[0].out_channels == small[1].nb.num_features == small[3].in_channels < 6


def test_check_slimming_passes(shared):
    net, _, x = shared
    outcome = check_slimming(net.eval(), x, 0.5)
    assert outcome.passed, outcome


def test_checkpoints_load_both_ways(shared):
    net, budget, x = shared
    with torch.no_grad():
        masked_layers(net)["2.a"].prune_mask[2] = -1.0
    again = mask_model(residual())
    share_masks(again, x)
    again.load_state_dict(net.state_dict())
    independent = mask_model(residual())
    independent.load_state_dict(net.state_dict())
    for model in (again, independent):
        assert torch.equal(model.eval()(x), net.eval()(x))
        assert MacBudget(model, x).kept_macs() == budget.kept_macs()
    dense = mask_model(residual())
    share_masks(dense, x)
    dense.load_state_dict(residual().state_dict())
    assert all(layer.prune_mask.eq(1).all() for layer in masked_layers(dense).values())


def test_a_mask_is_still_shared_once_checkpoints_were_assigned(shared):
    """``load_state_dict(assign=True)`` puts the checkpoint's tensors in place of the parameters, layer by layer."""
    net, _, _ = shared
    for value in (0.25, 0.5):  # the second time the masks are those of the first checkpoint
        masked_layers(net)["3"].prune_mask.data.fill_(value)
        saved = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        net.load_state_dict(saved, assign=True)
        layers = masked_layers(net)
        assert layers["1.a"].prune_mask is layers["2.a"].prune_mask is layers["3"].prune_mask
        assert layers["3"].prune_mask.tolist() == [value] * 6
        assert len(list(net.parameters())) == 8 + 8 + 3  # convolutions, norms, masks


def test_an_optimizer_step_moves_the_mask_once(shared):
    net, _, x = shared
    mask = masked_layers(net)["1.a"].prune_mask
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    expected = mask.detach() - 0.1 * mask.grad
    optimizer.step()
    assert torch.equal(masked_layers(net)["3"].prune_mask, expected)


class Overlap(nn.Module):
    """A concatenation, a permutation and a plain reader of one tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.plain, self.cat, self.flip = nn.Conv2d(4, 2, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(4, 2, 1)
        self.twin = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.stem(x)
        both = torch.cat([y, self.other(x)], 1)
        return self.plain(y) + self.cat(both) + self.flip(y.flip(1)) + self.twin(F.max_pool2d(y, 1))


def test_overlaps_and_permutations_are_tied(prove):
    net = mask_model(Overlap(), exclude=["stem", "other"])
    x = torch.randn(1, 3, 4, 4)
    assert share_masks(net, x) == [["plain", "twin", "cat", "flip"]]
    assert net.plain.prune_mask is net.twin.prune_mask
    budget = MacBudget(net, x)
    assert budget.n_entries == 8
    parts = budget.split(torch.arange(8))
    assert parts["flip"].tolist() == parts["plain"].flip(0).tolist() == parts["cat"][:4].flip(0).tolist()
    prove(Overlap(), x, share=True)
    assert not any(isinstance(m, SlimLayer) for m in slim(net, x).modules())


class Rooted(nn.Module):
    """As in DLA: a layer reads a stream from before and after it was added to, one tensor behind the other."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.more = nn.Conv2d(3, width, 1), nn.Conv2d(3, width, 1)
        self.between, self.root = nn.Conv2d(width, 3, 1), nn.Conv2d(2 * width, 2, 1)

    def forward(self, x):
        y = self.stem(x)
        z = F.relu(y + self.more(x))
        return self.root(torch.cat([z, y], 1)), self.between(y)


def rooted(width=8):
    """The network with tied masks and its budget."""
    net, x = mask_model(Rooted(width), exclude=["stem", "more"]), torch.randn(1, 3, 2, 2)
    assert share_masks(net, x) == [["root", "between"]]
    return net, MacBudget(net, x), x


def test_a_layer_that_reads_a_stream_at_two_places_has_one_entry_for_both(prove, counted_macs):
    net, budget, x = rooted()
    assert budget.n_entries == 8
    parts = budget.split(torch.arange(8))
    assert parts["root"].tolist() == [*parts["between"].tolist()] * 2
    net.between.prune_mask.data[[1, 4, 6]] = -1.0
    net.root.prune_mask.data[[1, 4, 6, 9, 12, 14]] = -1.0
    budget.require_tied()
    assert budget.kept_macs() == 4 * 5 * (3 + 3 + 2 * 2 + 3)
    small = slim(net, x, budget)
    assert counted_macs(small, x) == budget.kept_macs()
    assert not any(isinstance(m, SlimLayer) for m in small.modules())
    assert (small.stem.out_channels, small.root.in_channels) == (5, 10)
    for now, before in zip(small(x), net.eval()(x), strict=True):
        torch.testing.assert_close(now, before)
    budget.ratio().backward()
    slope = 0.5 * (1 - torch.tanh(torch.tensor(1.0)) ** 2)
    for gradient in (net.between.prune_mask.grad[0], net.root.prune_mask.grad[0], net.root.prune_mask.grad[8]):
        assert float(gradient / slope) == pytest.approx(4 * (3 + 3 + 2 * 2 + 3) / budget.dense_macs)
    prove(Rooted(), x, share=True)


def test_both_places_of_a_stream_drop_the_same_channels_even_if_all_masks_are_off():
    """The mask's first maximum stays on: channel 2, at both places, with and without the pruner's bank."""
    net, budget, x = rooted()
    values = torch.tensor([-2.0, -2.0, -1.0, -3.0, -1.0, -2.0, -2.0, -2.0])
    net.between.prune_mask.data.copy_(values)
    net.root.prune_mask.data.copy_(torch.cat([values, values]))
    assert net.root.binary_mask().tolist() == [0, 0, 1, 0, 0, 0, 0, 0] * 2
    budget.require_tied()
    before = net.eval()(x)
    banked = InTrainPruner(net, x, 0.4, steps=4, budget=budget)
    for now, old in zip(net(x), before, strict=True):
        torch.testing.assert_close(now, old)
    banked.detach()
    for now, old in zip(slim(net, x, budget)(x), before, strict=True):
        torch.testing.assert_close(now, old)


def test_a_layer_that_alone_reads_a_stream_twice_is_tied_within_itself():
    class Alone(Rooted):
        def forward(self, x):
            y = self.stem(x)
            return self.root(torch.cat([F.relu(y + self.more(x)), y], 1))

    net, x = mask_model(Alone(), exclude=["stem", "more"]), torch.randn(1, 3, 2, 2)
    assert share_masks(net, x) == []
    assert MacBudget(net, x).n_entries == 8


def test_training_cuts_and_resuming_hold_both_places_of_a_stream_together():
    torch.manual_seed(0)
    data = torch.randn(40, 4, 3, 2, 2)

    def start():
        torch.manual_seed(1)
        net, budget, _ = rooted()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        pruner = InTrainPruner(net, data[0], 0.4, steps=40, budget=budget, slim_every=10)
        pruner.attach(optimizer)
        pruner.active = True
        return net, optimizer, pruner

    def train(net, optimizer, pruner, batches):
        for batch in batches:
            optimizer.zero_grad()
            sum(out.square().mean() for out in net(batch)).backward()
            optimizer.step()
            width = len(net.between.prune_mask)
            assert torch.equal(net.root.prune_mask[:width], net.root.prune_mask[width:])
            optimizer.zero_grad()
            pruner.cut(optimizer)

    one = start()
    train(*one, data[:30])
    net, optimizer, pruner = one
    assert len(net.root.mask_firsts) == len(net.root.prune_mask) < 16  # cut by now
    saved = copy.deepcopy([part.state_dict() for part in (pruner, net, optimizer)])
    train(*one, data[30:])
    two = start()
    for part, state in zip((two[2], two[0], two[1]), saved, strict=True):
        part.load_state_dict(state)
    train(*two, data[30:])
    assert torch.equal(pruner.budget.flat_masks(), two[2].budget.flat_masks())
    assert 0.3 < two[2].freeze().ratio == pruner.freeze().ratio <= 0.4
    for a, b in zip(net.eval()(data[0]), two[2].slim().eval()(data[0]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_whose_root_was_not_tied_is_refused_and_slims_without_sharing():
    net, budget, x = rooted()
    apart = mask_model(Rooted(), exclude=["stem", "more"])  # as sharing left such layers before
    apart.root.prune_mask.data[[0, 9]] = -1.0
    pruner = InTrainPruner(apart, x, 0.99, steps=4)
    with pytest.raises(ValueError, match="the mask of '(root|between)' is shared otherwise"):
        InTrainPruner(net, x, 0.99, steps=4, budget=budget).load_state_dict(pruner.state_dict())
    freeze_masks(apart)
    net.load_state_dict(apart.state_dict())
    with pytest.raises(ValueError, match="leave the sharing out"):
        slim(net, x, budget)
    alone = mask_model(Rooted(), exclude=["stem", "more"])
    alone.load_state_dict(apart.state_dict())
    for a, b in zip(slim(alone, x)(x), apart.eval()(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("on", "step", "kept"), [(9, 4, 8), (9, 3, 9), (9, 2, 10), (10, 8, 8), (11, 8, 16)])
def test_multiples_count_a_stream_at_both_places(on, step, kept):
    """Of 9 channels the root reads 18, two above a multiple of 4: one channel goes. Stem and 'between' have 9."""
    budget = rooted(24)[1]
    masks = torch.arange(24.0).flip(0) + 1
    divisor = Divisor(budget, step)
    assert divisor.up(masks, divisor.nearest(masks, masks > 24 - on)).tolist() == [i < kept for i in range(24)]


class Crossing(nn.Module):
    """A layer that reads a half of each of two tensors, with readers of their own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.a, self.b, self.both = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y, z = self.one(x), self.two(x)
        return self.a(y) + self.b(z) + self.both(torch.cat([y[:, 2:], z[:, :2]], 1))


def test_a_layer_between_two_tied_masks_never_loses_all_its_inputs():
    """Each of the four halves keeps a channel: 'a' could keep one of its first half, 'b' one of its last."""
    net = mask_model(Crossing(), exclude=["one", "two"])
    x = torch.randn(1, 3, 4, 4)
    share_masks(net, x)
    budget = MacBudget(net, x)
    for layer in masked_layers(net).values():
        layer.prune_mask.data.fill_(-1.0)
    net.a.prune_mask.data[0] = net.b.prune_mask.data[3] = 1.0
    found = project(budget, 0.99)
    assert {name: part.tolist() for name, part in budget.split(found.pattern).items()} == {
        "a": [True, False, True, False],
        "b": [True, False, False, True],
        "both": [True, False, True, False],
    }
    before = net.eval()(x)
    freeze_masks(net, budget.split(found.pattern))
    torch.testing.assert_close(net(x), before)
    torch.testing.assert_close(slim(net, x, budget)(x), before)


def test_nothing_to_share_is_no_error_but_no_masks_are():
    net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)))
    assert share_masks(net, torch.randn(1, 3, 4, 4)) == []
    with pytest.raises(ValueError, match="no masks"):
        share_masks(residual(), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="frozen"):
        share_masks(freeze_masks(mask_model(residual())), torch.randn(1, 3, 4, 4))


# -- streams that go on behind zero channels: tied masks


class Padded(nn.Module):
    """A stream of 4 channels that goes on as one of 8 (two zero channels in front), 1x1 convolutions throughout."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)
        self.pad, self.c, self.d = ChannelPad(4, 8), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 8, 1)
        self.e, self.f, self.fc = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = F.relu(self.pad(x) + self.d(F.relu(self.c(x))))
        x = F.relu(x + self.f(F.relu(self.e(x))))
        return self.fc(x.mean((2, 3)))


IMAGE = torch.randn(1, 3, 2, 2)


def padded():
    """The network with tied masks and its budget."""
    net = mask_model(Padded(), linear=True)
    assert share_masks(net, IMAGE) == [["a", "c", "e", "fc"]]
    return net, MacBudget(net, IMAGE)


def drop(net, *channels):
    """Takes channels of the narrow stream, 0 to 3, out of all masks that stand for them."""
    for channel in channels:
        net.a.prune_mask.data[channel] = -1.0
        net.e.prune_mask.data[channel + 2] = -1.0


def test_a_channel_that_a_pad_hands_on_is_one_entry():
    net, budget = padded()
    assert net.a.prune_mask is net.c.prune_mask is not net.e.prune_mask is net.fc.prune_mask
    assert budget.n_entries == 4 + 3 + 5 + 4 + 5  # narrow stream, b, d, the rest of the wide stream, f
    assert len(budget.flat_masks()) == budget.n_entries
    parts = budget.split(torch.arange(budget.n_entries))
    assert parts["a"].tolist() == parts["e"][2:6].tolist() == [0, 1, 2, 3]
    assert not set(parts["e"][[0, 1, 6, 7]].tolist()) & {0, 1, 2, 3}


def test_macs_of_tied_masks_by_hand(counted_macs):
    net, budget = padded()
    drop(net, 1, 3)
    net.e.prune_mask.data[0] = -1.0
    budget.require_tied()
    narrow, wide = 2, 5
    macs = 4 * (3 * narrow + narrow * 3 + 3 * narrow + narrow * 5 + 5 * wide + wide * 5 + 5 * wide) + wide * 2
    assert budget.kept_macs() == macs
    small = slim(net, IMAGE, budget)
    assert counted_macs(small, IMAGE) == macs
    assert not any(isinstance(m, SlimLayer) for m in small.modules())
    assert (small.pad.front, small.pad.in_channels, small.pad.out_channels) == (1, 2, 5)


def test_the_gradient_of_a_tied_entry_is_the_same_in_every_copy_and_what_dropping_it_saves():
    """Entry 2 alone on where linear: the stream's channels enter the MACs one by one, so the difference is exact."""
    net, budget = padded()
    drop(net, 1)
    pattern = budget.flat_pattern()
    off = pattern.clone()
    off[2] = False
    saving = (budget.macs_of(pattern) - budget.macs_of(off)) / budget.dense_macs
    assert saving * budget.dense_macs == 4 * (3 + 3 + 3 + 5 + 5 + 5 + 5) + 2
    budget.ratio().backward()
    slope = 0.5 * (1 - torch.tanh(torch.tensor(1.0)) ** 2)
    for gradient in (net.a.prune_mask.grad[2], net.e.prune_mask.grad[4]):
        assert float(gradient / slope) == pytest.approx(saving)


@pytest.mark.parametrize("b", ["auto", 20.0])
def test_training_keeps_tied_masks_equal_and_moves_them_as_one_shared_mask(b):
    """An independent reference: the same steps with the sum of both copies' gradients, by hand."""
    torch.manual_seed(1)
    net, budget = padded()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    pruner = InTrainPruner(net, IMAGE, 0.4, b=b, lr=0.1, steps=20, budget=budget)
    pruner.attach(optimizer)
    velocity, mask = torch.zeros(4), net.a.prune_mask.detach().clone()
    for step in range(25):
        pruner.active = 5 <= step
        optimizer.zero_grad()
        net(torch.randn(4, 3, 2, 2)).square().mean().backward()
        if step < 5:
            velocity = 0.9 * velocity + net.a.prune_mask.grad + net.e.prune_mask.grad[2:6]
            mask -= 0.3 * velocity
        optimizer.step()
        assert torch.equal(net.a.prune_mask, net.e.prune_mask[2:6])
        if step < 5:
            torch.testing.assert_close(net.a.prune_mask.detach(), mask)
    if b == "auto":
        assert 0.3 < pruner.ratio() <= 0.4
    report = pruner.freeze()
    small = pruner.slim()
    torch.testing.assert_close(small.eval()(IMAGE), net.eval()(IMAGE))
    assert sum(p.numel() for p in small.parameters()) == report.params_kept


def test_a_layer_that_did_not_run_stays_tied():
    net, budget = padded()
    net.a.prune_mask.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    budget.tie_gradients()
    assert net.e.prune_mask.grad.tolist() == [0, 0, 1, 2, 3, 4, 0, 0]
    assert net.b.prune_mask.grad is None


def test_masks_that_came_apart_are_refused_and_a_pruner_ties_them_again():
    net, budget = padded()
    net.a.prune_mask.data[0] = -1.0
    with pytest.raises(ValueError, match=r"masks of e \(1 in all\) drop other channels.*tie_gradients"):
        slim(net, IMAGE, budget)
    InTrainPruner(net, IMAGE, 0.4, steps=4, budget=budget)
    assert net.e.prune_mask[2] == -1.0
    slim(net, IMAGE, budget)


def test_no_stage_loses_its_last_channel_in_forward_and_budget_alike():
    net, budget = padded()
    for layer in (net.a, net.e):
        layer.prune_mask.data.fill_(-1.0)
    net.a.prune_mask.data[2] = net.e.prune_mask.data[4] = -0.5
    net.e.prune_mask.data[7] = -0.7
    budget.require_tied()
    assert budget.split(budget.flat_pattern())["e"].tolist() == [False] * 4 + [True] + [False] * 2 + [True]
    banked = InTrainPruner(net, IMAGE, 0.4, steps=4, budget=budget)
    before = net.eval()(IMAGE)
    banked.detach()
    torch.testing.assert_close(net(IMAGE), before)
    torch.testing.assert_close(slim(net, IMAGE, budget)(IMAGE), before)


def test_checks_and_copies_know_tied_masks():
    net, _ = padded()
    twin = copy.deepcopy(net)
    randomize_masks(twin, 0.5, torch.Generator().manual_seed(0))
    MacBudget(twin, IMAGE).require_tied()
    assert torch.equal(twin.a.prune_mask, twin.e.prune_mask[2:6])
    outcome = check_slimming(net.eval(), IMAGE, 0.5)
    assert outcome.passed, outcome


def test_padded_streams_are_proved(prove):
    prove(Padded(), IMAGE, share=True, linear=True)


def test_a_run_with_ties_resumes_exactly_and_not_from_one_without():
    torch.manual_seed(0)
    data = torch.randn(12, 4, 3, 2, 2)

    def start(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        pruner = InTrainPruner(net, IMAGE, 0.4, steps=12)
        pruner.attach(optimizer)
        pruner.active = True
        return net, optimizer, pruner

    def train(net, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()

    one = start(padded()[0])
    train(*one[:2], data[:6])
    saved = copy.deepcopy([part.state_dict() for part in one])
    train(*one[:2], data[6:])
    two = start(padded()[0])
    for part, state in zip(two, saved, strict=True):
        part.load_state_dict(state)
    train(*two[:2], data[6:])
    assert torch.equal(one[2].budget.flat_masks(), two[2].budget.flat_masks())
    assert torch.equal(one[0](data[0]), two[0](data[0]))
    apart = mask_model(Padded(), linear=True)
    for layer, first in ((apart.c, apart.a), (apart.fc, apart.e)):
        layer.prune_mask = first.prune_mask
    with pytest.raises(ValueError, match="shared otherwise"):
        InTrainPruner(apart, IMAGE, 0.4, steps=12).load_state_dict(saved[2])


def test_multiples_count_the_channels_that_a_wide_stream_has_from_a_narrow_one():
    net, budget = padded()
    drop(net, 0)
    net.e.prune_mask.data[:2] = -1.0
    masks = budget.flat_masks().detach()
    divisor = Divisor(budget, 2)
    on = divisor.up(masks, divisor.nearest(masks, budget.flat_pattern()))
    kept = {name: int(part.sum()) for name, part in budget.split(on).items()}
    assert kept == {"a": 2, "b": 3, "d": 5, "e": 4, "f": 5}
    short_in, short_out = divisor.missing(divisor.counts(on))
    assert not bool(short_in.any() or short_out.any())


def test_progressive_slimming_cuts_tied_masks_together():
    torch.manual_seed(0)
    net, budget = padded()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruner = InTrainPruner(net, IMAGE, 0.3, steps=40, budget=budget, slim_every=10)
    pruner.attach(optimizer)
    pruner.active = True
    cuts = 0
    for _ in range(40):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 2, 2)).square().mean().backward()
        optimizer.step()
        if pruner.cut_is_due:
            optimizer.zero_grad()
            cuts += pruner.cut(optimizer)
            budget.require_tied()
            assert len(net.a.prune_mask) == len(net.a.mask_ties)
    assert cuts
    assert len(net.a.prune_mask) < 4
    before = net.eval()(IMAGE)
    pruner.freeze()
    torch.testing.assert_close(pruner.slim().eval()(IMAGE), net(IMAGE))
    assert before.shape == (1, 2)
