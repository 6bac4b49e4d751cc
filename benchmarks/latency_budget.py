"""Does a network frozen at a latency target run at it? Prediction of a table beside the slimmed network's clock.

    python benchmarks/latency_budget.py CONFIG TABLE [--targets 0.7 0.5 0.3] [--rounds 20] [--margin 0.1]

TABLE comes from tools/profile_latency.py, whose shape, batch and threads are taken. Masks are random (three seeds),
with layers that keep different parts, and frozen at each target as PruneHook does it; all networks are timed in turn.
"""

import argparse
import json

import torch

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.models.report import build_masked
from mmitp.pruning import MacBudget, project
from mmitp.pruning.cost import LatencyCost
from mmitp.pruning.freeze import lowest_ratio
from mmitp.pruning.latency import predicted_and_measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("table")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--margin", type=float, default=0.1)
    args = parser.parse_args()
    with open(args.table, encoding="utf-8") as file:
        table = json.load(file)
    model = build_masked(load_config(args.config)).to(table["device"]).eval()
    example = blank_example(model, tuple(table["shape"]), batch=table["batch"])
    budget, plain = (MacBudget(model, example, cost=LatencyCost(table, m)) for m in (args.margin, 0.0))
    rows = budget.tables(torch.device("cpu")).literal_row
    patterns, targets = [torch.ones(budget.n_literals, dtype=torch.bool)], [1.0]
    low = lowest_ratio(budget)
    print(f"cheapest reachable: {low:.3f} of the latency")
    for target in args.targets:
        if target < low:
            print(f"target {target} is out of reach")
            continue
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            level = torch.rand(len(budget.layers), generator=generator)
            masks = 0.01 + 0.5 * level[rows] + torch.rand(budget.n_literals, generator=generator)
            for name, part in budget.split(masks).items():
                dict(budget.masked)[name].prune_mask.data.copy_(part)
            patterns.append(project(budget, target).pattern)
            targets.append(target)
    results = predicted_and_measured(model, example, plain, patterns, table["threads"], args.rounds)
    dense = results[0][1]
    print(f"{table['machine']}, {table['threads']} thread(s), torch {torch.__version__}, {tuple(table['shape'])}")
    print("target  MACs kept  table ms  clock ms  clock/dense  table/clock")
    for target, pattern, (table_ns, clock_ns) in zip(targets, patterns, results, strict=True):
        kept = budget.macs_of(pattern) / budget.dense_macs
        print(
            f"{target:6.2f} {kept:10.3f} {table_ns / 1e6:9.3f} {clock_ns / 1e6:9.3f} {clock_ns / dense:12.3f} "
            f"{table_ns / clock_ns:12.3f}"
        )


if __name__ == "__main__":
    main()
