"""What the masks and the budget cost a training step: masked against dense, paired in one run.

    python benchmarks/mask_cost.py [--rounds 7] [--width 1.0] [--shape 96 320] [--batch 2] [--threads 2]

A step is forward, loss on the raw maps, backward and Adam on CenterNet-DLA34; the masked one adds Optimizer 2 with its
gradient of the ratio, at every step. Rounds alternate between the two, and the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from mmengine import Config
from mmengine.registry import MODELS, init_default_scope

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.pruning import MacBudget, mask_model
from mmitp.pruning.pressure import balanced, descend, ratio_gradient

ROOT = Path(__file__).resolve().parent.parent


def build(width: float) -> torch.nn.Module:
    cfg = Config.fromfile(str(ROOT / "configs" / "_base_" / "models" / "centernet_dla34.py"))
    channels = tuple(int(c * width) for c in (64, 128, 256, 512))
    cfg.merge_from_dict({"model.backbone.width": width, "model.neck.in_channels": channels})
    cfg.merge_from_dict({"model.bbox_head.in_channels": channels[0], "model.bbox_head.feat_channels": int(256 * width)})
    torch.manual_seed(0)
    return MODELS.build(cfg.model).train()


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    loss = sum(o.square().mean() for branch in model(x) for o in branch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def optimizer_2(budget: MacBudget) -> None:
    descend(budget, balanced(budget, ratio_gradient(budget)), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--shape", type=int, nargs=2, default=(96, 320))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    init_default_scope("mmdet")
    dense, masked = build(args.width), mask_model(build(args.width))
    x = torch.randn(args.batch, 3, *args.shape)
    budget = MacBudget(masked, x[:1], check=False)
    optimizers = {m: torch.optim.Adam(m.parameters(), lr=1e-4) for m in (dense, masked)}
    times: dict[str, list[float]] = dict(dense=[], masked=[], optimizer_2=[])
    for i in range(args.rounds + 1):
        for name, model in (("dense", dense), ("masked", masked)):
            start = time.perf_counter()
            step(model, optimizers[model], x)
            if i:
                times[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        optimizer_2(budget)
        if i:
            times["optimizer_2"].append(time.perf_counter() - start)
            times["masked"][-1] += times["optimizer_2"][-1]
    h, w = args.shape
    print(f"CenterNet-DLA34 x {args.width}, batch {args.batch}, {h}x{w}, {args.threads} threads, {torch.__version__}")
    print(f"{budget.n_literals} masks; {args.rounds} rounds; min / median / max")
    for name, values in times.items():
        print(f"{name:>14}: {min(values):.4f} / {statistics.median(values):.4f} / {max(values):.4f} s")
    for name, over in (("masked", "dense"), ("optimizer_2", "dense")):
        ratios = [a / b for a, b in zip(times[name], times[over], strict=True)]
        print(f"{name + ' / ' + over:>22}: {min(ratios):.4f} / {statistics.median(ratios):.4f} / {max(ratios):.4f}")


if __name__ == "__main__":
    main()
