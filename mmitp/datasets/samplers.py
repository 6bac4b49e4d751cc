"""Samplers of parts of a data set: for tests and for a trial of a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_world_size
from mmengine.runner import set_random_seed
from torch.utils.data import Sampler

from mmitp.registry import DATA_SAMPLERS

__all__ = ["EvenSubset", "FewSamples"]


@DATA_SAMPLERS.register_module()
class EvenSubset(Sampler):
    """``images`` of a data set, spread evenly over it and in its order (test sets may be sorted by class).

    Args:
        dataset: the data set.
        images: how many.
        seed: not used; a runner gives it to every sampler.

    Raises:
        ValueError: for no images or more than there are, or in a distributed test.
    """

    def __init__(self, dataset: Any, images: int, seed: int | None = None) -> None:
        if not 1 <= images <= len(dataset):
            raise ValueError(f"cannot take {images} of {len(dataset)} test images")
        if get_world_size() > 1:
            raise ValueError("a subset of the test images is tested by one process: leave the launcher out")
        self.dataset = dataset  # mmdet's batch samplers ask it for the images' sizes
        self.indices = [i * len(dataset) // images for i in range(images)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


@DATA_SAMPLERS.register_module()
class FewSamples(EvenSubset):
    """``images`` of a data set, spread evenly over it, or all of a smaller one: for a trial of a config.

    Python's, numpy's and torch's generators are seeded by each index, so that the random augmentation of a batch is the
    same every time and in a resumed trial.

    Args:
        dataset: the data set.
        images: how many at most.
        seed: not used; a runner gives it to every sampler.

    Raises:
        ValueError: for an empty data set, or with several processes.
    """

    def __init__(self, dataset: Any, images: int, seed: int | None = None) -> None:
        super().__init__(dataset, min(images, len(dataset)), seed)

    def __iter__(self) -> Iterator[int]:
        for index in self.indices:
            set_random_seed(index)
            yield index
