"""Inference time of slimmed networks against the dense one, beside Torch-Pruning at the same MACs, in one process.

    python benchmarks/inference.py --net resnet50 --batch 1 [--threads 1] [--rounds 9] [--target 0.5] [--draw even]
    python benchmarks/inference.py --net centernet_dla34_plain --only dense,gather/16,stream/16,torch-pruning/16

Rounds alternate between the networks; every round's dense time is divided by the other's, so that what else runs on
the machine cancels out. ``share`` is the speed-up over the ideal one, dense MACs / kept MACs. The networks are
untrained and their masks drawn: ``even`` from one uniform distribution, so that every layer loses about the same share;
``uneven`` with a normal offset (sigma 0.3) a layer, as trained masks differ from layer to layer. The freeze cuts the
lowest to the target.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.pruning import MacBudget, fold_norms, freeze_masks, mask_model, project, share_masks, slim
from mmitp.pruning.check import counted_macs

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = dict(
    resnet50="imagenet/resnet50_imagenet.py",
    resnet18="imagenet/resnet18_imagenet.py",
    centernet_dla34="_base_/models/centernet_dla34.py",
    centernet_dla34_plain="_base_/models/centernet_dla34_plain.py",
)


def build(net: str) -> nn.Module:
    cfg = Config.fromfile(str(ROOT / "configs" / CONFIGS[net]))
    init_default_scope("mmdet" if "centernet" in net else "mmpretrain")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # nothing is 0 or 1 by chance
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def draw_masks(budget: MacBudget, how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for _, layer in budget.masked:
        values = torch.rand(layer.prune_mask.shape, generator=generator) + 2
        if how == "uneven":
            values += 0.3 * torch.randn((), generator=generator)
        layer.prune_mask.data.copy_(values)


def pruned(
    dense: nn.Module, shape: tuple[int, int], share: str, target: float, draw: str
) -> Callable[[int], nn.Module]:
    """A function of the divisor that returns the slimmed network."""
    model = mask_model(copy.deepcopy(dense), linear=True)
    small = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if share == "stream":
        share_masks(model, small)
    budget = MacBudget(model, torch.zeros(1, 3, *shape), check=False)
    draw_masks(budget, draw)

    def at(divisor: int) -> nn.Module:
        freeze_masks(model, budget.split(project(budget, target, fill=True, divisor=divisor).pattern))
        return slim(model, small, budget)

    return at


def torch_pruning(dense: nn.Module, shape: tuple[int, int], target: float, divisor: int) -> nn.Module:
    """L1 pruning by Torch-Pruning, one ratio for all layers, the largest network at or under the target's MACs.

    The layers that give the model's outputs are named to it. It follows the graph from the outputs back and so leaves
    DLA's dead projections at their width, whose inputs it narrows: it gets a network without them.

    Raises:
        SystemExit: half of the channels less are still above the target.
    """
    import torch_pruning as tp

    def prune(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        for module in model.modules():
            if isinstance(project := getattr(module, "project", None), nn.Sequential) and not any(
                p.requires_grad for p in project.parameters()
            ):
                module.project = nn.Identity()
        pruner = tp.pruner.BasePruner(
            model,
            torch.zeros(1, 3, 64, 64),
            tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=[
                m
                for m in model.modules()
                if isinstance(m, nn.Linear) or isinstance(m, nn.Conv2d) and m.out_channels <= 3
            ],
            round_to=divisor if divisor > 1 else None,
        )
        pruner.step()
        return model

    limit = target * macs_at(dense, shape)
    low, high = 0.2, 0.5
    best = prune(high)
    if macs_at(best, shape) > limit:
        raise SystemExit(f"--target {target}: Torch-Pruning is asked for ratios up to {high}, which do not get there")
    for _ in range(5):
        middle = (low + high) / 2
        model = prune(middle)
        if macs_at(model, shape) <= limit:
            high, best = middle, model
        else:
            low = middle
    return best


def macs_at(model: nn.Module, shape: tuple[int, int]) -> int:
    """MACs of one image."""
    return counted_macs(model, torch.zeros(1, 3, *shape))


def profile(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds by class of operations in one pass."""
    classes = dict(
        convolution="convolution conv2d mm addmm bmm baddbmm matmul",
        norm="batch_norm",
        gather="index_select",
        scatter="index_copy",
        elementwise="relu clamp add sigmoid mul",
        pooling="pool",
        sampling="embedding_bag grid_sample",
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        model(x)
    out: dict[str, float] = defaultdict(float)
    for event in prof.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((k for k, words in classes.items() if any(w in name for w in words.split())), "other")
        out[kind] += event.self_cpu_time_total / 1e6
    return dict(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=CONFIGS, default="resnet50")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--draw", choices=("even", "uneven"), default="even")
    parser.add_argument("--only", help="comma-separated names of rows")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = tuple(args.shape) if args.shape else ((384, 1280) if "centernet" in args.net else (224, 224))
    x = torch.randn(args.batch, 3, *shape, generator=torch.Generator().manual_seed(0))
    dense = build(args.net)
    makers = {share: pruned(dense, shape, share, args.target, args.draw) for share in ("gather", "stream")}
    makers["torch-pruning"] = lambda divisor: torch_pruning(dense, shape, args.target, divisor)
    names = [f"{kind}/{divisor}" if divisor > 1 else kind for divisor in (1, 8, 16) for kind in makers]
    nets: dict[str, nn.Module] = {}
    for name in args.only.split(",") if args.only else ["dense", *names]:
        kind, _, divisor = name.partition("/")
        model = dense if kind == "dense" else makers[kind](int(divisor or 1))
        nets[name] = model
        nets[name + " folded"] = fold_norms(model, torch.randn(1, 3, 64, 64))
    macs = {name: macs_at(model, shape) for name, model in nets.items() if not name.endswith("folded")}
    if args.channels_last:
        x = x.to(memory_format=torch.channels_last)
        nets = {name: model.to(memory_format=torch.channels_last) for name, model in nets.items()}

    # One thread's CPU time is the time it would take alone on the machine.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for i in range(args.rounds + 1):
            for name, model in nets.items():
                start = clock()
                model(x)
                if i:
                    times[name].append(clock() - start)
        print(
            f"{args.net}, batch {args.batch}, {shape[0]}x{shape[1]}, target {args.target}, masks {args.draw}, "
            f"{args.threads} thread(s), torch {torch.__version__}, {platform.machine()} "
            f"{torch.backends.cpu.get_cpu_capability()}, {args.rounds} alternating rounds"
        )
        print(f"{'':26} {'MACs':>6} {'ms (min)':>9} {'speed-up: min / median / max':>30} {'share of ideal':>16}")
        for name, seconds in times.items():
            base = "dense folded" if name.endswith("folded") else "dense"
            ratio = macs[name.removesuffix(" folded")] / macs["dense"]
            gains = [a / b for a, b in zip(times[base], seconds, strict=True)]
            speed = f"{min(gains):.2f} / {statistics.median(gains):.2f} / {max(gains):.2f}"
            print(
                f"{name:26} {ratio:6.3f} {1e3 * min(seconds):9.1f} {speed:>30} "
                f"{100 * statistics.median(gains) * ratio:12.0f} %"
            )
        if args.profile:
            for name, model in nets.items():
                parts = sorted(profile(model, x).items(), key=lambda kv: -kv[1])
                print(f"{name:26} " + ", ".join(f"{k} {1e3 * v:.1f}" for k, v in parts if v > 1e-4) + " ms")


if __name__ == "__main__":
    main()
