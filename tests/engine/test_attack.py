"""The training loss that attacks raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmitp  # noqa: F401  (makes the stack importable without compiled operators)
from mmitp.engine import attack

pytest.importorskip("mmdet", reason="mmdet is not installed")

from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData


class Head(nn.Module):
    """Does to its data samples what heads do: other labels, and in place other boxes where it writes."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.seen: list[tuple[list, list, dict]] = []
        self.places: set[int] = set()

    def forward(self, inputs: Tensor, data_samples: list[DetDataSample], mode: str) -> dict[str, Tensor]:
        sample = data_samples[0]
        boxes = sample.gt_instances.bboxes
        self.seen.append((boxes.tolist(), sample.gt_instances.labels.tolist(), dict(sample.metainfo)))
        self.places.add(boxes.data_ptr())
        loss = (inputs * boxes.sum()).mean()
        sample.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)  # as RPN heads do
        sample.set_metainfo(dict(flip=True))
        if self.writes:
            boxes.mul_(0.5)
        return dict(loss=loss)


@pytest.mark.parametrize("writes", [False, True])
def test_every_pass_sees_the_same_samples_and_their_tensors_are_copied_once(
    monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    copies: list[Any] = []
    real = attack.copy.deepcopy
    monkeypatch.setattr(attack.copy, "deepcopy", lambda value, *memo: copies.append(value) or real(value, *memo))
    sample = DetDataSample(metainfo=dict(img_shape=(8, 8), flip=False))
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[0.0, 1.0, 4.0, 5.0]]), labels=torch.tensor([2]))
    head, samples = Head(writes), [sample]
    loss = attack.training_loss(head, dict(inputs=torch.ones(1, 3, 8, 8), data_samples=samples))
    values = [float(loss(torch.ones(1, 3, 8, 8))) for _ in range(4)]
    assert values == [10.0] * 4
    assert head.seen == [([[0.0, 1.0, 4.0, 5.0]], [2], dict(img_shape=(8, 8), flip=False))] * 4
    assert sum(value is samples for value in copies) == (4 if writes else 1)
    assert sample.gt_instances.bboxes.tolist() == [[0.0, 1.0, 4.0, 5.0]]
    assert sample.gt_instances.labels.tolist() == [2]
    assert sample.gt_instances.bboxes.data_ptr() not in head.places
