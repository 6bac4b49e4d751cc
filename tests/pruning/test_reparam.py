"""Networks that merge their branches for deployment: under masks, slimmed, and as they are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmitp.pruning import freeze_masks, mask_model, masked_layers, randomize_masks, slim


class Block(nn.Module):
    """3x3 plus 1x1, merged into one 3x3 by reading their weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.large(x) + self.small(x) if hasattr(self, "small") else self.large(x))

    def switch_to_deploy(self) -> None:
        merged = nn.Conv2d(self.large.in_channels, self.large.out_channels, 3, padding=1)
        merged.weight.data = self.large.weight.data + F.pad(self.small.weight.data, [1, 1, 1, 1])
        merged.bias.data = self.large.bias.data + self.small.bias.data
        self.large = merged
        del self.small

    def fuse(self, x: Tensor) -> Tensor:
        return x


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), Block(8), nn.Conv2d(8, 2, 1)).eval()


@pytest.mark.parametrize("frozen", [True, False])
def test_masks_are_folded_before_branches_merge(frozen: bool) -> None:
    net, x = mask_model(network()), torch.randn(2, 3, 8, 8)
    randomize_masks(net, 0.5, torch.Generator().manual_seed(1))
    if frozen:
        freeze_masks(net)
    expected = net(x)
    twin = copy.deepcopy(net)
    net[1].switch_to_deploy()
    torch.testing.assert_close(net(x), expected)
    assert list(masked_layers(net)) == ["2.large", "2.small", "3"]
    twin[2].switch_to_deploy()
    torch.testing.assert_close(twin(x), expected)
    assert len(masked_layers(twin)) == 3


def test_a_slimmed_block_is_refused_by_name_and_a_dense_one_merged_as_ever() -> None:
    net, x = mask_model(network(), include=["2"]), torch.randn(2, 3, 8, 8)
    for layer in masked_layers(net).values():
        layer.prune_mask.data[:3] = -1.0
    small = slim(net, x)
    with pytest.raises(ValueError, match=r"Block.switch_to_deploy\(\) merges .* 'large' has been slimmed.*fold_masks"):
        small[2].switch_to_deploy()
    dense = network()
    expected = dense(x)
    dense[1].switch_to_deploy()
    torch.testing.assert_close(dense(x), expected)


def test_a_method_with_arguments_is_something_else() -> None:
    net = mask_model(network())
    net[1].fuse(torch.ones(1))
    assert len(masked_layers(net)) == 5
