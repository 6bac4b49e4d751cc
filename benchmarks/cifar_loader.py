"""Images a second from CIFAR-10 to the network's input: mmitp's in-memory batches against mmpretrain's pipeline.

    python benchmarks/cifar_loader.py [--data-root data/cifar10] [--batch-size 128] [--batches 100] [--rounds 5]

Both loaders are built by mmengine, crop with padding 4, mirror, and end in ClsDataPreprocessor. The rounds alternate,
so that a change in the machine's load meets both; printed are the median rates and each round's ratio (min,
median, max).
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import mmitp  # noqa: F401  isort: skip  (first: makes the stack below importable without compiled operators)

import torch
from mmengine.runner import Runner
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.utils import register_all_modules
from torch.utils.data import DataLoader


def fast_loader(args: argparse.Namespace) -> DataLoader:
    return Runner.build_dataloader(
        dict(
            batch_size=args.batch_size,
            num_workers=0,
            collate_fn=dict(type="mmitp.take_batch"),
            sampler=dict(type="DefaultSampler", shuffle=True),
            dataset=dict(type="mmitp.FastCIFAR10", data_root=args.data_root, split="train"),
        ),
        seed=0,
    )


def stock_loader(args: argparse.Namespace, workers: int) -> DataLoader:
    pipeline = [
        dict(type="RandomCrop", crop_size=32, padding=4),
        dict(type="RandomFlip", prob=0.5, direction="horizontal"),
        dict(type="PackInputs"),
    ]
    return Runner.build_dataloader(
        dict(
            batch_size=args.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=dict(type="default_collate"),
            sampler=dict(type="DefaultSampler", shuffle=True),
            dataset=dict(type="CIFAR10", data_root=args.data_root, split="train", download=False, pipeline=pipeline),
        ),
        seed=0,
    )


def endless(loader: DataLoader) -> Iterator[dict]:
    while True:
        yield from loader


def rate(batches: Iterator[dict], preprocessor: ClsDataPreprocessor, args: argparse.Namespace) -> float:
    time.sleep(1)  # worker processes of the other loaders finish reading ahead
    images = 0
    start = time.perf_counter()
    for _ in range(args.batches):
        images += len(preprocessor(next(batches), training=True)["inputs"])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data/cifar10")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=100, help="batches a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--workers", type=int, default=2, help="worker processes of mmpretrain's loader, tried beside none"
    )
    args = parser.parse_args()

    register_all_modules()
    preprocessor = ClsDataPreprocessor(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], num_classes=10)
    preprocessor.to("cuda" if torch.cuda.is_available() else "cpu")
    streams = {
        "mmitp": endless(fast_loader(args)),
        "mmpretrain, 0 workers": endless(stock_loader(args, 0)),
        f"mmpretrain, {args.workers} workers": endless(stock_loader(args, args.workers)),
    }
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for stream in streams.values():
        preprocessor(next(stream), training=True)
    for _ in range(args.rounds):
        for name, stream in streams.items():
            rates[name].append(rate(stream, preprocessor, args))

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}, {args.rounds} rounds"
    )
    for name, values in rates.items():
        line = f"{name:25s} {statistics.median(values):10,.0f} images/s"
        if name != "mmitp":
            ratios = sorted(fast / stock for fast, stock in zip(rates["mmitp"], values, strict=True))
            line += f"   mmitp is {ratios[0]:.1f} / {statistics.median(ratios):.1f} / {ratios[-1]:.1f} times as fast"
        print(line)


if __name__ == "__main__":
    main()
