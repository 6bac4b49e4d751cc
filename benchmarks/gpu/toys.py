"""Stand-ins for data that is not at hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from mmitp.datasets.cifar import FILES, FOLDER


def toy_cifar10(root: Path, images: int) -> str:
    """CIFAR-10's files with noise whose mean brightness is the class, ``images`` in each; returns their folder."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in [name for names in FILES.values() for name in names]:
        if not (folder / name).is_file():
            labels = rng.integers(0, 10, images)
            data = np.clip(rng.normal(25 * labels[:, None], 40, (images, 3072)), 0, 255).astype(np.uint8)
            (folder / name).write_bytes(pickle.dumps(dict(data=data, labels=labels.tolist())))
    return str(root)


def cifar10(out: Path, dry: bool, root: str = "data/cifar10", images: int = 1000) -> tuple[str, bool]:
    """The folder of CIFAR-10, and whether it is the real one; a dry run's has 40 images."""
    if not dry and (Path(root) / FOLDER / "test_batch").is_file():
        return root, True
    return toy_cifar10(out / ("toy_cifar10_dry" if dry else "toy_cifar10"), 8 if dry else images), False
