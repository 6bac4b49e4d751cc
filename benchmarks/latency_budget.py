"""Does a network frozen at a latency target run at it? The freeze by the clock, checked by timing all of them anew.

    python benchmarks/latency_budget.py CONFIG TABLE [--targets 0.7 0.5 0.3] [--seeds 3] [--rounds 20] [--margin 0.1]

TABLE comes from tools/profile_latency.py, whose shape, batch and threads are taken. Masks are random, with layers that
keep different parts, and frozen at each target as PruneHook does it: by the table less its margin, and by the clock
(Calibration), which starts from there. Afterwards all networks are timed in turn.
"""

import argparse
import json
from functools import partial

import torch

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.models.report import build_masked
from mmitp.pruning import MacBudget, project
from mmitp.pruning.freeze import lowest_ratio
from mmitp.pruning.latency import Calibration, LatencyCost, clock_ratio, time_in_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("table")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--margin", type=float, default=0.1)
    args = parser.parse_args()
    with open(args.table, encoding="utf-8") as file:
        table = json.load(file)
    model = build_masked(load_config(args.config)).to(table["device"]).eval()
    example = blank_example(model, tuple(table["shape"]), batch=table["batch"])
    cost = LatencyCost(table, args.margin)
    budget = MacBudget(model, example, cost=cost)
    rows = budget.tables(torch.device("cpu")).entry_row
    patterns, labels = [torch.ones(budget.n_entries, dtype=torch.bool)], ["dense"]
    low = lowest_ratio(budget)
    print(f"cheapest reachable: {low:.3f} of the latency by the table")
    for target in args.targets:
        if target < low:
            print(f"target {target} is out of reach")
            continue
        for seed in range(args.seeds):
            generator = torch.Generator().manual_seed(seed)
            level = torch.rand(len(budget.layers), generator=generator)
            masks = 0.01 + 0.5 * level[rows] + torch.rand(budget.n_entries, generator=generator)
            for name, part in budget.split(masks).items():
                dict(budget.masked)[name].prune_mask.data.copy_(part)
            cost.counted = 1 - args.margin
            patterns.append(project(budget, target).pattern)
            calibration = Calibration(budget, target, partial(clock_ratio, model, example, budget))
            patterns.append(calibration.project().pattern)
            labels += [f"{target} by the table", f"{target} by the clock: {calibration.clock:.3f}"]
    times = time_in_turn(model, example, budget, patterns, args.rounds)
    ratios = (times / times[:, :1]).quantile(0.5, dim=0).tolist()
    print(f"{table['machine']}, {table['threads']} thread(s), torch {torch.__version__}, {tuple(table['shape'])}")
    print(f"dense: {cost.dense / 1e6:.3f} ms by the table, {float(times[:, 0].quantile(0.5)) / 1e6:.3f} by the clock")
    print(f"{'target':<26} MACs kept  by table  by clock")
    for label, pattern, clock in zip(labels, patterns, ratios, strict=True):
        kept, table = budget.macs_of(pattern) / budget.dense_macs, cost.by_table(pattern)
        print(f"{label:<26} {kept:9.3f} {table:9.3f} {clock:9.3f}")


if __name__ == "__main__":
    main()
