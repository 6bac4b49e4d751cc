"""One mask for all readers of a stream: one parameter everywhere, a narrower stream, nothing guessed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmitp.pruning import MacBudget, freeze_masks, mask_model, masked_layers, project, share_masks, slim
from mmitp.pruning.check import check_slimming
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


def test_overlaps_and_permutations_keep_masks_of_their_own(prove):
    net = mask_model(Overlap(), exclude=["stem", "other"])
    assert share_masks(net, torch.randn(1, 3, 4, 4)) == [["plain", "twin"]]
    prove(Overlap(), torch.randn(1, 3, 4, 4), share=True)


def test_nothing_to_share_is_no_error_but_no_masks_are():
    net = mask_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)))
    assert share_masks(net, torch.randn(1, 3, 4, 4)) == []
    with pytest.raises(ValueError, match="no masks"):
        share_masks(residual(), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="frozen"):
        share_masks(freeze_masks(mask_model(residual())), torch.randn(1, 3, 4, 4))
