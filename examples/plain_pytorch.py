"""In-train pruning in a plain PyTorch loop: no OpenMMLab, no Trainer. `pip install -e .` is enough.

    python examples/plain_pytorch.py                     # generated images, a minute on one core
    python examples/plain_pytorch.py --cifar10 DIR       # DIR holds the standard python batches (data_batch_1, ...)

The lines that prune are marked with ``# prune``; the rest is an ordinary training script. The pruner follows the
optimizer, so accumulation, gradient scalers and schedulers need nothing more. ``docs/own_loop.md`` shows how such a run
is stopped and goes on, and the same for Hugging Face; ``lightning_pruning.py`` is a callback for Lightning. In timm's
loop, and with Accelerate's optimizer (tried: 1.x), the same lines stand where an epoch begins and ends.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mmitp.pruning import InTrainPruner, mask_model


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network for images of 32x32 pixels."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def generated(count: int, seed: int) -> TensorDataset:
    """Noise with a bright bar whose place is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    rows = torch.arange(32)
    bar = (rows[None] >= 3 * labels[:, None]) & (rows[None] < 3 * labels[:, None] + 4)
    return TensorDataset(images + 0.7 * bar[:, None, :, None], labels)


def cifar10(folder: Path, files: list[str]) -> TensorDataset:
    """The standard python batches of CIFAR-10, normalised."""
    images, labels = [], []
    for name in files:
        with open(folder / name, "rb") as file:
            batch = pickle.load(file, encoding="bytes")  # noqa: S301  the data set's own format: trust its source
        images.append(torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32))
        labels += batch[b"labels"]
    return TensorDataset((torch.cat(images).float() - 120) / 64, torch.tensor(labels))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(data, batch_size=256))
    model.train()
    return 100 * right / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="train on CIFAR-10 instead of generated images")
    parser.add_argument("--target", type=float, default=0.5, help="part of the operations to keep")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--images", type=int, default=2048, help="generated images to train on")
    parser.add_argument("--out", type=Path, default=Path("pruned.pt2"), help="where the small network goes")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.cifar10:
        train = cifar10(args.cifar10, [f"data_batch_{i}" for i in range(1, 6)])
        test = cifar10(args.cifar10, ["test_batch"])
    else:
        train, test = generated(args.images, seed=0), generated(512, seed=1)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    begin, end = max(args.epochs // 15, 1), max(args.epochs // 3, 2)  # the window, in epochs
    example = torch.zeros(1, 3, 32, 32)

    model = mask_model(ResNet())  # prune: before the optimizer is made
    masks = [p for name, p in model.named_parameters() if name.endswith("prune_mask")]  # prune
    weights = [p for name, p in model.named_parameters() if not name.endswith("prune_mask")]
    optimizer = torch.optim.SGD(
        [dict(params=weights, weight_decay=5e-4), dict(params=masks, weight_decay=0.0)], lr=0.05, momentum=0.9
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    pruner = InTrainPruner(model, example, args.target, steps=(end - begin) * len(loader))  # prune
    pruner.attach(optimizer)  # prune

    for epoch in range(args.epochs):
        pruner.active = begin <= epoch < end  # prune
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        del loss  # prune: it holds the graph of the network as it was
        if epoch < end:
            report = pruner.report()
        if epoch + 1 == end:
            report = pruner.freeze()  # prune: at or under the target
            pruner.slim(optimizer)  # prune: the rest of the run trains the small network
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}, operations kept {report.ratio:.4f}", flush=True)

    print(f"accuracy {accuracy(model, test):.1f} % on {len(test)} test images")
    print(f"MACs {report.macs_dense:,} -> {report.macs_kept:,} ({report.ratio:.4f}), target {args.target}")
    print(f"parameters {report.params_dense:,} -> {sum(p.numel() for p in model.parameters()):,}")
    torch.export.save(torch.export.export(model.eval(), (example,)), args.out)
    print(f"{args.out}: loads anywhere with torch.export.load, without mmitp")


if __name__ == "__main__":
    main()
