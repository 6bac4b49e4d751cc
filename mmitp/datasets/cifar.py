"""CIFAR-10 held in memory as uint8 and augmented a batch at a time.

Every image is stored once with its border, so a random crop is a window of that array, and one indexed read cuts the
windows of a whole batch. The data loader then only passes lists of indices about::

    train_dataloader = dict(
        batch_size=256, num_workers=0, collate_fn=dict(type='mmitp.take_batch'),
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(type='mmitp.FastCIFAR10', data_root='data/cifar10', split='train'))
"""

import codecs
import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from mmengine import MessageHub
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mmitp.registry import DATASETS, FUNCTIONS

__all__ = ["CIFAR10_CLASSES", "FastCIFAR10", "load_cifar10", "take_batch"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-py"
FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads what the CIFAR batches hold, numpy arrays and plain containers, and nothing that could run code."""

    allowed = (
        ("numpy", "_reconstruct", np.zeros(0).__reduce__()[0]),
        ("numpy", "ndarray", np.ndarray),
        ("numpy", "dtype", np.dtype),
        ("_codecs", "encode", codecs.encode),  # bytes in files rewritten by Python 3
    )

    def find_class(self, module: str, name: str) -> Any:
        for package, allowed, value in self.allowed:
            if (module.split(".")[0], name) == (package, allowed):
                return value
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR batch")


def _load_batch(file: BinaryIO, path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        entry = _ArrayUnpickler(file, encoding="latin1").load()
        images = np.asarray(entry["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(entry["labels"], dtype=np.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a CIFAR-10 python batch ({error}); unpack it again, see data/README.md"
        ) from error
    if len(images) != len(labels):
        raise ValueError(
            f"{path} holds {len(images)} images but {len(labels)} labels; unpack it again, see data/README.md"
        )
    return images, labels


def load_cifar10(data_root: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the standard python batches in the files' order.

    Args:
        data_root: the folder that holds ``cifar-10-batches-py``.
        split: 'train' (data_batch_1 to 5) or 'test'.

    Returns:
        uint8 images N x 3 x 32 x 32 (RGB) and int64 labels N.

    Raises:
        ValueError: for an unknown split, a missing file (names the folder) or a file that is not a CIFAR-10 batch.
    """
    if split not in FILES:
        raise ValueError(f"CIFAR-10 has the splits 'train' and 'test', not {split!r}")
    folder = Path(data_root) / FOLDER
    missing = [name for name in FILES[split] if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"CIFAR-10: {', '.join(missing)} not found in {folder}; "
            "put the standard python batches there, see data/README.md"
        )
    parts = []
    for name in FILES[split]:
        with (folder / name).open("rb") as file:
            parts.append(_load_batch(file, folder / name))
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return torch.from_numpy(images), torch.from_numpy(labels)


@DATASETS.register_module()
class FastCIFAR10(Dataset):
    """CIFAR-10 for mmpretrain's ``ImageClassifier``: whole batches at once, uint8, ready for ``ClsDataPreprocessor``.

    A batch is ``dict(inputs=uint8 N x 3 x 32 x 32 RGB, data_samples=[DataSample, ...])``; the loader needs
    ``collate_fn=dict(type='mmitp.take_batch')``. With ``augment``, each image is cropped at random after padding with
    ``padding`` zeros and mirrored with probability one half.

    The draws are a function of ``seed``, of the Runner's epoch, and of the indices in the batch. They depend neither on
    the number of workers nor on how many batches were read before: a resumed run continues exactly. A batch that comes
    again within an epoch (an endless sampler, or a loop without a Runner) draws anew each time, by a count that each
    process keeps for itself.

    Args:
        data_root: the folder that holds ``cifar-10-batches-py``.
        split: 'train' or 'test'.
        augment: crop and mirror; by default only for 'train'.
        padding: pixels of zero border for the random crop.
        seed: of the augmentation; by default torch's initial seed, that is the Runner's ``randomness.seed``.
        device: where images are held and augmented. 'auto' takes the current CUDA device if there is one, so that
            neither a copy nor a worker stands between the data and the model (about 240 MB); worker processes need
            'cpu'.

    Raises:
        ValueError: as :func:`load_cifar10`, and for CUDA images read in a worker process or with ``pin_memory=True``.
    """

    def __init__(
        self,
        data_root: str = "data/cifar10",
        split: str = "train",
        augment: bool | None = None,
        padding: int = 4,
        seed: int | None = None,
        device: str = "auto",
    ) -> None:
        # mmpretrain is heavy and users of the detectors may not have it: imported when a classification set is built.
        from mmitp.datasets.cifar_samples import labelled_samples

        self._labelled_samples = labelled_samples
        self.augment = split == "train" if augment is None else augment
        self.padding = padding if self.augment else 0
        self.seed = torch.initial_seed() if seed is None else seed
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        images, labels = load_cifar10(data_root, split)
        self.labels = labels.to(device)
        self.bordered = F.pad(images.to(device), (self.padding,) * 4)
        # N x 3 x rows x columns x 32 x 32: a view in which [n, :, y, x] is the window with its corner at (y, x).
        self._windows = self.bordered.unfold(2, 32, 1).unfold(3, 32, 1)
        self.metainfo = {"classes": CIFAR10_CLASSES}
        self._epoch = 0
        self._reads: dict[int, int] = {}  # how often each batch has been read in this epoch

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, indices: Sequence[int], epoch: int = 0, again: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns of the crops' corners (0 to 2 * padding, pixels) and mirror flags, one of each per index.

        Args:
            indices: of the batch.
            epoch: the Runner's.
            again: how often this batch has come before in that epoch.
        """
        seed = _digest([self.seed % 2**64, epoch, again, *indices])
        generator = torch.Generator().manual_seed(seed)
        corners = torch.randint(0, 2 * self.padding + 1, (2, len(indices)), generator=generator)
        mirror = torch.rand(len(indices), generator=generator) < 0.5
        return corners[0], corners[1], mirror

    def cut(self, indices: Tensor, row: Tensor, column: Tensor, mirror: Tensor) -> Tensor:
        """The images of ``indices``, cropped and mirrored as :meth:`draw` says: uint8 N x 3 x 32 x 32.

        Nothing is read on the host: arguments are tensors ``(N,)`` on the images' device.
        """
        images = self._windows[indices, :, row, column]
        return torch.where(mirror[:, None, None, None], images.flip(3), images)

    def _draw_next(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        epoch = int(MessageHub.get_current_instance().get_info("epoch", 0))
        if epoch != self._epoch:
            self._epoch, self._reads = epoch, {}
        batch = _digest(indices)
        again = self._reads.get(batch, 0)
        self._reads[batch] = again + 1
        return self.draw(indices, epoch, again)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Read one batch (torch's batched fetching calls this)."""
        device = self.labels.device
        if device.type != "cpu" and get_worker_info() is not None:
            raise ValueError(
                "FastCIFAR10 holds its images on the GPU and cannot serve worker processes: set num_workers=0 (the "
                "fast choice) or device='cpu' on the dataset"
            )
        chosen = torch.as_tensor(indices, device=device)
        if self.augment:
            row, column, mirror = (t.to(device, non_blocking=True) for t in self._draw_next(indices))
            images = self.cut(chosen, row, column, mirror)
        else:
            images = self.bordered[chosen]
        make = dict if device.type == "cpu" else _DeviceBatch
        return make(inputs=images, data_samples=self._labelled_samples(self.labels[chosen]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one image: ``inputs`` 3 x 32 x 32 and its data sample."""
        batch = self.__getitems__([index])
        return {"inputs": batch["inputs"][0], "data_samples": batch["data_samples"][0]}


class _DeviceBatch(dict):
    """A batch that is on an accelerator already; a data loader with ``pin_memory`` asks it to move."""

    def pin_memory(self) -> None:
        raise ValueError(
            "FastCIFAR10 holds its images on the GPU, where there is nothing to pin: set pin_memory=False on the "
            "dataloader, or device='cpu' on the dataset"
        )


def _digest(numbers: Sequence[int]) -> int:
    """64 bits (with sign) that depend on every number."""
    data = np.array(numbers, dtype=np.uint64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


@MMENGINE_FUNCTIONS.register_module()  # configs written up to 0.1.0 say 'take_batch'
@FUNCTIONS.register_module()
def take_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Collate function of data sets that hand over whole batches: passes the batch on."""
    return batch
