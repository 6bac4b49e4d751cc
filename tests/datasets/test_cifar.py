"""FastCIFAR10: file order, augmentation against a loop, reproducible draws, and the way through mmengine's loader."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mmitp.datasets.cifar import CIFAR10_CLASSES, FastCIFAR10, load_cifar10

pytest.importorskip("mmpretrain")
from mmengine import MessageHub
from mmengine.runner import Runner
from mmpretrain.structures import DataSample

PER_FILE = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Standard batches of random images; the first pixel of image i of file f is (f, i, 0)."""
    root = tmp_path_factory.mktemp("cifar10")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = rng.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        data[:, 0], data[:, 1024], data[:, 2048] = number, np.arange(PER_FILE), 0
        entry = {"batch_label": name, "labels": [i % 10 for i in range(PER_FILE)], "data": data, "filenames": []}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    return root


def loader(root: Path, batch_size: int = 16, shuffle: bool = True, epoch: int = 0, **kwargs):
    options = {k: kwargs.pop(k) for k in ("num_workers",) if k in kwargs}
    built = Runner.build_dataloader(
        {
            "batch_size": batch_size,
            "num_workers": 0,
            "collate_fn": {"type": "take_batch"},
            "sampler": {"type": "DefaultSampler", "shuffle": shuffle},
            "dataset": {"type": "mmitp.FastCIFAR10", "data_root": str(root), "device": "cpu", **kwargs},
            **options,
        },
        seed=3,
    )
    built.sampler.set_epoch(epoch)
    return built


def test_files_are_read_in_their_order(root: Path) -> None:
    images, labels = load_cifar10(root, "train")
    assert images.shape == (5 * PER_FILE, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [f for f in range(5) for _ in range(PER_FILE)]
    assert images[:, 1, 0, 0].tolist() == list(range(PER_FILE)) * 5
    assert labels.tolist() == [i % 10 for i in range(PER_FILE)] * 5


def test_test_split_keeps_order_and_pixels(root: Path) -> None:
    images, labels = load_cifar10(root, "test")
    batches = list(loader(root, 16, shuffle=False, split="test"))
    assert [len(b["data_samples"]) for b in batches] == [16, 16, 8]
    assert torch.equal(torch.cat([b["inputs"] for b in batches]), images)
    samples = [s for b in batches for s in b["data_samples"]]
    assert torch.equal(torch.cat([s.gt_label for s in samples]), labels)


@pytest.fixture(autouse=True)
def first_epoch() -> None:
    """Runners of other tests leave their epoch in mmengine's message hub, and crops go by it."""
    MessageHub.get_current_instance().update_info("epoch", 0)


def test_batch_equals_padding_cropping_and_mirroring_one_image_at_a_time(root: Path) -> None:
    dataset = FastCIFAR10(str(root), seed=5, device="cpu")
    images, labels = load_cifar10(root, "train")
    indices = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:64].tolist()
    batch = dataset.__getitems__(indices)
    rows, columns, mirror = dataset.draw(indices)
    for out, sample, index, row, column, flip in zip(
        batch["inputs"], batch["data_samples"], indices, rows, columns, mirror, strict=True
    ):
        padded = np.zeros((3, 40, 40), dtype=np.uint8)
        padded[:, 4:36, 4:36] = images[index].numpy()
        crop = padded[:, row : row + 32, column : column + 32]
        assert np.array_equal(out.numpy(), crop[:, :, ::-1] if flip else crop)
        assert sample.gt_label.tolist() == [labels[index]]


def test_draws_cover_every_offset_and_both_orientations_evenly(root: Path) -> None:
    dataset = FastCIFAR10(str(root), seed=0, device="cpu")
    rows, columns, mirror = dataset.draw(range(20_000))
    for corners in (rows, columns):
        counts = torch.bincount(corners)
        assert len(counts) == 9
        # 20,000 / 9 = 2,222 expected; the standard deviation is 44.
        assert ((counts - 2222).abs() < 5 * 44).all()
    assert abs(mirror.float().mean().item() - 0.5) < 5 * 0.5 / 20_000**0.5


def test_same_seed_and_epoch_repeat_and_another_epoch_or_seed_differs(root: Path) -> None:
    def epoch(number: int, seed: int) -> torch.Tensor:
        return torch.cat([b["inputs"] for b in loader(root, epoch=number, seed=seed)])

    first = epoch(0, 1)
    assert torch.equal(first, epoch(0, 1))
    assert not torch.equal(first, epoch(0, 2))
    order, other = (list(loader(root, epoch=n).sampler) for n in (0, 1))
    dataset = FastCIFAR10(str(root), seed=1, device="cpu")
    assert sorted(order) == sorted(other) == list(range(200))
    assert not torch.equal(dataset.draw(order[:16])[0], dataset.draw(other[:16])[0])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 50])
def test_every_epoch_crops_anew_and_a_resumed_one_like_the_first_run(
    root: Path, batch_size: int, shuffle: bool
) -> None:
    """At batch size 1, or without shuffling, the indices of a batch alone say nothing of the epoch."""
    hub = MessageHub.get_current_instance()

    def epochs(numbers: range) -> list[dict[int, torch.Tensor]]:
        built = loader(root, batch_size=batch_size, shuffle=shuffle, seed=1)
        seen = []
        for number in numbers:
            hub.update_info("epoch", number)  # as the Runner does
            built.sampler.set_epoch(number)
            images = torch.cat([batch["inputs"] for batch in built])
            seen.append(dict(zip(built.sampler, images, strict=True)))
        return seen

    try:
        first, second, third = epochs(range(3))
        changed = sum(not torch.equal(first[i], second[i]) for i in range(200))
        assert changed > 180  # two of 162 draws agree once in 162
        assert all(torch.equal(image, third[i]) for i, image in epochs(range(2, 3))[0].items())
    finally:
        hub.update_info("epoch", 0)


def test_one_image_read_again_is_cropped_anew_without_a_runner(root: Path) -> None:
    dataset = FastCIFAR10(str(root), seed=1, device="cpu")
    reads = torch.stack([dataset[5]["inputs"] for _ in range(20)])
    assert len(torch.unique(reads.flatten(1), dim=0)) > 10


def test_epoch_order_is_the_samplers(root: Path) -> None:
    shuffled = loader(root, augment=False)
    images, _ = load_cifar10(root, "train")
    assert torch.equal(torch.cat([b["inputs"] for b in shuffled]), images[list(shuffled.sampler)])


def test_seed_follows_torchs_initial_seed(root: Path) -> None:
    torch.manual_seed(11)
    torch.rand(3)
    assert FastCIFAR10(str(root), device="cpu").seed == 11


def test_worker_processes_give_the_same_batches(root: Path) -> None:
    here, there = list(loader(root, seed=1)), list(loader(root, seed=1, num_workers=2))
    assert len(here) == len(there)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a["inputs"], b["inputs"])
        assert [s.gt_label.tolist() for s in a["data_samples"]] == [s.gt_label.tolist() for s in b["data_samples"]]


def test_single_image_reading_matches_the_batch(root: Path) -> None:
    dataset = FastCIFAR10(str(root), split="test", device="cpu")
    item = dataset[7]
    assert item["inputs"].shape == (3, 32, 32)
    assert torch.equal(item["inputs"], dataset.__getitems__([7])["inputs"][0])
    assert len(dataset) == PER_FILE
    assert dataset.metainfo["classes"] == CIFAR10_CLASSES


def test_samples_pass_through_mmpretrains_preprocessor_like_its_own(root: Path) -> None:
    from mmpretrain.models import ClsDataPreprocessor

    batch = FastCIFAR10(str(root), split="test", device="cpu").__getitems__(range(4))
    stock = [DataSample().set_gt_label(int(s.gt_label)) for s in batch["data_samples"]]
    preprocessor = ClsDataPreprocessor(mean=[1.0, 2.0, 3.0], std=[2.0, 4.0, 8.0], num_classes=10, to_onehot=True)
    ours = preprocessor(batch, training=True)
    theirs = preprocessor({"inputs": batch["inputs"], "data_samples": stock}, training=True)
    assert torch.equal(ours["inputs"], theirs["inputs"])
    assert torch.equal(ours["inputs"][:, 1], (batch["inputs"][:, 1].float() - 2) / 4)
    for a, b in zip(ours["data_samples"], theirs["data_samples"], strict=True):
        assert a.to_dict().keys() == b.to_dict().keys() == {"gt_label", "gt_score", "num_classes"}
        assert torch.equal(a.gt_label, b.gt_label)
        assert torch.equal(a.gt_score, b.gt_score)


def test_missing_data_names_the_folder_and_where_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test_batch not found in .*cifar-10-batches-py.*data/README\.md"):
        FastCIFAR10(str(tmp_path), split="test")


def test_unknown_split_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="'train' and 'test', not 'val'"):
        FastCIFAR10(str(root), split="val")


class Command:
    """Pickles to a call, as a hostile batch would."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize(
    "content",
    [
        b"not a pickle",
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [1, 2]}, protocol=2),
        pickle.dumps(Command(), protocol=2),
    ],
    ids=["garbage", "no labels", "too few labels", "wrong size", "code"],
)
def test_a_broken_batch_is_named_and_runs_no_code(tmp_path: Path, monkeypatch, content: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch"):
        load_cifar10(tmp_path, "test")
    assert not (tmp_path / "hostile").exists()


def test_the_real_files_are_read_exactly() -> None:
    path = Path(os.environ.get("MMITP_CIFAR10", "data/cifar10"))
    if not (path / "cifar-10-batches-py" / "test_batch").is_file():
        pytest.skip("CIFAR-10 is not in data/cifar10 nor where MMITP_CIFAR10 points")
    images, labels = load_cifar10(path, "test")
    assert images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(labels).tolist() == [1000] * 10
    assert (
        hashlib.sha256(images.numpy().tobytes()).hexdigest()
        == "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56"
    )


def test_images_on_a_device_refuse_to_be_pinned(root: Path) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    there = FastCIFAR10(str(root), "test", device="meta").__getitems__([0, 1])
    assert there["inputs"].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="pin_memory=False"):
        pin_memory(there)
    assert type(FastCIFAR10(str(root), "test", device="cpu").__getitems__([0, 1])) is dict
