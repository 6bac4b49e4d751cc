"""What slimmed layers pay for reading and writing a part of the channels in ``channels_last``, forward and backward.

    python benchmarks/gathers.py [--rounds 30] [--write]

``mmitp.pruning.slim_layers`` gathers by ``Tensor.gather`` and scatters by ``Tensor.scatter_`` there. They stand beside
``index_select`` and ``index_copy_``, alone and in a training step of ResNet-20 cut at random to 0.3 of its operations.
Both take turns, seconds are the process's CPU time on one thread, and ratios are those of a round. ``--write`` puts
them into ``benchmarks/results/gathers.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import origin  # first: see there
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import Tensor

from mmitp.engine.config import load_config
from mmitp.pruning import MacBudget, freeze_masks, slim, slim_layers
from mmitp.pruning.check import randomize_to

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gathers.json"
#: images, channels, side, channels that are read: ResNet-20's stages at 0.6 of their channels
SHAPES = ((128, 16, 32, 10), (128, 32, 16, 20), (128, 64, 8, 40))


def select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).index_select(-1, index).permute(0, 3, 1, 2)


def copy(x: Tensor, dim: int, index: Tensor, width: int) -> Tensor:
    n, _, h, w = x.shape
    return x.new_zeros([n, h, w, width]).index_copy_(-1, index, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def image(n: int, channels: int, side: int) -> Tensor:
    return torch.randn(n, channels, side, side).contiguous(memory_format=torch.channels_last)


def compared(ours: Callable[[], Any], other: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Milliseconds of both (medians), and how many times as long the other takes (quartiles of the rounds)."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 3):
        pair = []
        for work in (ours, other):
            start = time.process_time()
            work()
            pair.append((time.process_time() - start) * 1e3)
        times.append((pair[0], pair[1]))
    times = times[3:]
    low, middle, high = statistics.quantiles((b / a for a, b in times), n=4)
    medians = [round(statistics.median(column), 2) for column in zip(*times, strict=True)]
    return dict(ms=medians, ratio=[round(value, 3) for value in (low, middle, high)])


def passes(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Callable[[], None]:
    """A forward and a backward pass of a function of ``x``."""
    x = x.detach().requires_grad_()
    gradient = torch.randn_like(function(x, *arguments))

    def work() -> None:
        x.grad = None
        function(x, *arguments).backward(gradient)

    return work


def training_step(gathers: Callable[..., Tensor], scatters: Callable[..., Tensor]) -> Callable[[], None]:
    """A training step of ResNet-20, slimmed to 0.3 by random masks, with these two functions in its layers."""
    cfg = load_config(str(ROOT / "configs/cifar10/resnet20_cifar10_psi30_early_auto_short.py"))
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    masked = MODELS.build(cfg.model).eval()
    example = torch.randn(1, 3, 32, 32)
    randomize_to(MacBudget(masked, example), 0.3)
    net = slim(freeze_masks(masked), example).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    x, samples = torch.randn(128, 3, 32, 32), [DataSample().set_gt_label(i % 10) for i in range(128)]

    def work() -> None:
        slim_layers.gather, slim_layers.scatter = gathers, scatters
        optimizer.zero_grad()
        net(x, samples, mode="loss")["loss"].backward()
        optimizer.step()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/gathers.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = slim_layers.gather, slim_layers.scatter
    found: dict[str, dict[str, Any]] = {}
    for n, channels, side, part in SHAPES:
        index = torch.randperm(channels)[:part].sort().values
        name = f"{n}x{channels}x{side}x{side}, {part} channels"
        whole, cut = image(n, channels, side), image(n, part, side)
        pairs = [passes(f, whole, -3, index) for f in (ours[0], select)]
        found[f"gather, {name}"] = compared(*pairs, args.rounds)
        pairs = [passes(f, cut, -3, index, channels) for f in (ours[1], copy)]
        found[f"scatter, {name}"] = compared(*pairs, args.rounds)
    steps = training_step(*ours), training_step(select, copy)
    found["training step of ResNet-20 cut to 0.3"] = compared(*steps, args.rounds)
    slim_layers.gather, slim_layers.scatter = ours
    columns = [
        dict(title="forward and backward"),
        dict(title="gather, scatter_: ms", decimals=2),
        dict(title="index_select, index_copy_: ms", decimals=2),
        dict(title="times as long: quartiles", decimals=2, join=" / ", bold_median=True),
    ]
    rows = [[name, *entry["ms"], entry["ratio"]] for name, entry in found.items()]
    text = json.dumps(dict(**origin(), rounds=args.rounds, columns=columns, rows=rows), indent=1)
    print(text)
    if args.write:
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
