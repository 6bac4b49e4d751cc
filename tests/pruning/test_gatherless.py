"""Slimmed networks without gathers: the same outputs from whole tensors, by whichever way is fewer multiplications."""

import pytest
import torch
from torch import nn

from mmitp.pruning import freeze_masks, mask_model, slim, without_gathers
from mmitp.pruning.check import counted_macs
from mmitp.pruning.slim_layers import SlimConv2d, SlimLayer, SlimLinear


class TwoReaders(nn.Module):
    """Two convolutions that read a stream of eight channels."""

    def __init__(self, kernel: int, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b = nn.Conv2d(8, outputs, kernel), nn.Conv2d(8, outputs, kernel)

    def forward(self, x):
        x = self.stem(x)
        return self.a(x) + self.b(x)


def slimmed(net, x, **kept):
    net = mask_model(net)
    freeze_masks(net, {name: torch.isin(torch.arange(8), torch.tensor(on)) for name, on in kept.items()})
    return slim(net, x)


def test_a_product_picks_the_channels_where_that_is_cheaper():
    x = torch.randn(2, 3, 8, 8)
    small = slimmed(TwoReaders(3, 4), x, a=[0, 1, 2, 3], b=[2, 4, 5, 6, 7])
    plain = without_gathers(small, x)
    # Picking 4 of 8 is 8 * 4 * 64 = 2,048 a picture; reading 4 channels more is 4 * 4 * 9 * 36 = 5,184.
    assert plain.a.pick.weight.shape == (4, 8, 1, 1)
    assert plain.a.pick.weight.flatten(1).tolist() == torch.eye(8)[:4].tolist()
    assert plain.b.pick.weight.flatten(1).tolist() == torch.eye(8)[[2, 4, 5, 6, 7]].tolist()
    assert torch.equal(plain.a.layer.weight, small.a.weight)
    assert counted_macs(plain, x) - counted_macs(small, x) == 2 * 64 * 8 * (4 + 5)
    torch.testing.assert_close(plain(x), small(x))
    assert isinstance(small.a, SlimLayer)  # the network given stays as it was


def test_the_weight_gets_zeros_where_that_is_cheaper():
    x = torch.randn(2, 3, 8, 8)
    small = slimmed(TwoReaders(1, 2), x, a=[0, 1, 2, 3, 4, 5], b=[2, 3, 4, 5, 6, 7])
    plain = without_gathers(small, x)
    # Reading 2 channels more is 2 * 2 * 64 a picture, picking 6 of 8 is 8 * 6 * 64.
    assert type(plain.a) is type(plain.b) is nn.Conv2d
    assert plain.a.in_channels == 8
    assert torch.equal(plain.a.weight[:, :6], small.a.weight)
    assert not plain.a.weight[:, 6:].any()
    assert counted_macs(plain, x) - counted_macs(small, x) == 2 * 2 * (2 * 2 * 64)
    torch.testing.assert_close(plain(x), small(x))


@pytest.mark.parametrize("make", [lambda: SlimConv2d(3, 2, 3, padding=1), lambda: SlimLinear(3, 2)])
def test_outputs_are_put_in_their_places(make):
    layer = make()
    layer.wire(None, torch.tensor([4, 1]), 5)
    x = torch.randn(2, 6, 6, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 6, 6)
    plain = without_gathers(nn.Sequential(layer), x)
    assert not any(isinstance(m, SlimLayer) for m in plain.modules())
    torch.testing.assert_close(plain(x), layer(x))


def test_a_grouped_convolution_is_picked_for_and_never_widened():
    layer = SlimConv2d(4, 4, 3, groups=4)
    layer.wire(torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 3, 5]), 6)
    x = torch.randn(1, 6, 6, 6)
    plain = without_gathers(nn.Sequential(layer), x)
    assert [name for name, _ in plain[0].named_children()] == ["pick", "layer", "place"]
    torch.testing.assert_close(plain(x), layer(x))


def test_a_layer_of_two_names_stays_one():
    conv = SlimConv2d(2, 2, 3, padding=1)
    conv.wire(torch.tensor([0, 2]), torch.tensor([1, 2]), 3)
    x = torch.randn(1, 3, 6, 6)
    net = nn.Sequential(conv, nn.ReLU(), conv)
    plain = without_gathers(net, x)
    assert plain[0] is plain[2]
    torch.testing.assert_close(plain(x), net(x))


def test_what_the_example_does_not_reach_keeps_its_gather():
    net = TwoReaders(1, 2)
    net.other = SlimConv2d(2, 2, 1)
    net.other.wire(torch.tensor([0, 2]), None, 2)
    assert type(without_gathers(net, torch.randn(1, 3, 6, 6)).other) is SlimConv2d


def test_a_masked_network_is_refused():
    with pytest.raises(ValueError, match="carries masks: slim it first"):
        without_gathers(mask_model(TwoReaders(3, 4)), torch.randn(1, 3, 8, 8))


def test_code_that_reads_the_layer_in_its_own_way_is_told():
    class Reads(TwoReaders):
        def forward(self, x):
            return super().forward(x) + len(list(self.a.children()))

    x = torch.randn(1, 3, 8, 8)
    small = slimmed(Reads(3, 4), x, a=[0, 1, 2, 3], b=[2, 4, 5, 6, 7])
    with pytest.raises(RuntimeError, match="Reads without its gathers does not compute the same"):
        without_gathers(small, x)
