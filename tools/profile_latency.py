"""Measure the latency table of a config's model on this machine, for PruneHook(cost=dict(type='latency', table=...)).

    python tools/profile_latency.py CONFIG --out table.json [--shape H W] [--batch 1] [--threads N] [--device cpu]

CONFIG is a file or a packaged config, with masks or without. The table holds the machine, versions, threads and shape
it was measured with, and how far it is off on slimmed networks it has not seen.
"""

import argparse
import json
import platform

import torch

import mmitp  # makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.models.report import build_masked, is_detector
from mmitp.pruning.latency import measure_latency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file, or package::name")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument(
        "--shape", type=int, nargs=2, metavar=("H", "W"), help="input size; 224 224, or 320 320 for detectors"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, help="threads of torch (CPU)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    try:
        model = build_masked(load_config(args.config)).to(args.device)
    except ValueError as error:
        parser.error(f"{args.config}: {error}")
    shape = tuple(args.shape) if args.shape else (320, 320) if is_detector(model) else (224, 224)
    example = blank_example(model, shape, batch=args.batch)
    table = measure_latency(model, example, args.threads, report=lambda line: print(line, flush=True))
    versions = dict(torch=torch.__version__, mmitp=mmitp.__version__, python=platform.python_version())
    table.update(versions=versions, shape=list(shape), batch=args.batch)
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(table, file)
    print("slimmed networks: MACs kept, ms measured, ms by the table")
    for n in table["networks"]:
        kind = "" if n["fitted"] else "  not among those fitted"
        print(f"{n['ratio']:.3f} {n['measured'] / 1e6:9.3f} {n['predicted'] / 1e6:9.3f}{kind}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
