"""What Only-Train-Once is told to prune, counted without the package."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmitp.models.resnet_cifar import ResNetCifar


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNetCifar(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)[0]


def test_a_channel_costs_what_its_two_convolutions_spend_on_it() -> None:
    prices = importlib.import_module("oto_cifar").channel_prices(Net(), torch.zeros(1, 3, 32, 32))
    assert len(prices) == 9
    assert prices["backbone.layer1.0.conv1"] == 1024 * 9 * (16 + 16)
    assert prices["backbone.layer2.0.conv1"] == 256 * 9 * (16 + 32)
    assert prices["backbone.layer3.2.conv1"] == 64 * 9 * (64 + 64)


def test_each_period_takes_the_fewest_channels_that_keep_to_the_path() -> None:
    oto = importlib.import_module("oto_cifar")
    model = Net()
    groups = [
        dict(is_prunable=True, is_auxiliary=False, num_groups=n, p_names=[f"backbone.layer{s}.{b}.conv1.weight"])
        for s, n in ((1, 16), (2, 32), (3, 64))
        for b in range(3)
    ]
    picked: list[int] = []
    optimizer: Any = SimpleNamespace(
        param_groups=groups,
        curr_pruning_period=0,
        pruned_group_idxes=[],
        active_num_redundant_groups=[0] * oto.PERIODS,
        identify_redundant_groups=lambda: picked.append(optimizer.active_num_redundant_groups[0]),
        # the first block's channels are the least important, in their order
        global_scores=[torch.arange(16.0), *(torch.full((g["num_groups"],), 100.0) for g in groups[1:])],
    )
    oto.count_by_operations(optimizer, model, ratio=0.3)
    optimizer.identify_redundant_groups()
    # without classifier 40,550,400 operations; 0.07 of them are 2,838,528, ten channels at 294,912 (nine are 2,654,208)
    assert picked == [10]


def test_a_layer_keeps_its_last_channel() -> None:
    oto = importlib.import_module("oto_cifar")
    assert oto.kept_macs(1000, [10, 20], [4, 8], [4, 3]) == 1000 - 3 * 10 - 3 * 20


def test_a_run_that_begins_anew_leaves_the_sweeps_lock_and_log(tmp_path: Path) -> None:
    for name in ("lock", "log.txt", "epoch_3.pth", "last_checkpoint"):
        (tmp_path / name).touch()
    importlib.import_module("oto_cifar").remove_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "log.txt"]
