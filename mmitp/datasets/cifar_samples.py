"""mmpretrain data samples made a batch at a time."""

from multiprocessing.reduction import ForkingPickler

from mmpretrain.structures import DataSample
from torch import Tensor

__all__ = ["LabelledSample", "labelled_samples"]


class LabelledSample(DataSample):
    """A ``DataSample`` whose label tensor is stored without checks.

    mmpretrain sets every label twice an iteration (pipeline and data preprocessor); for a small network on a GPU the
    checks alone would take a good part of the step.
    """

    def set_gt_label(self, value: Tensor) -> "LabelledSample":
        """Store a label; a one-element int64 tensor is taken as it is, all else as in ``DataSample``."""
        if isinstance(value, Tensor) and value.ndim == 1:
            self._data_fields.add("gt_label")
            self.__dict__["gt_label"] = value
            return self
        return super().set_gt_label(value)


def labelled_samples(labels: Tensor) -> list[LabelledSample]:
    """Make one sample for each of N int64 labels; ``gt_label`` has shape (1,)."""
    samples = []
    for label in labels.split(1):
        sample = LabelledSample.__new__(LabelledSample)
        sample.__dict__.update(_metainfo_fields=set(), _data_fields={"gt_label"}, gt_label=label)
        samples.append(sample)
    return samples


def _reduce(sample: LabelledSample) -> tuple:
    return _rebuild, (sample.gt_label.tolist(),)


def _rebuild(label: list[int]) -> LabelledSample:
    return labelled_samples(Tensor(label).long())[0]


# Sent from a worker as a number: a tensor each would need a file descriptor each.
ForkingPickler.register(LabelledSample, _reduce)
