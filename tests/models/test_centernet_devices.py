"""CenterNet's training step on a GPU made of labels: nothing of the host in it, and no wait for the device."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData

import mmitp  # noqa: F401
from mmitp.models import centernet_targets
from mmitp.registry import MODELS


def build(models_dir):
    config = Config.fromfile(models_dir / "centernet_dla34.py").model
    config.backbone.width = 0.125
    config.neck.in_channels = (8, 16, 32, 64)
    config.bbox_head.update(in_channels=8, feat_channels=8)
    return MODELS.build(config)


def batch(images: int) -> dict:
    """Images of 64 x 96 pixels with two objects and two ignored regions each."""
    samples = []
    for _ in range(images):
        sample = DetDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0)))
        boxes = torch.tensor([[30.0, 20.0, 66.0, 44.0], [5.0, 5.0, 20.0, 30.0]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
        sample.ignored_instances = InstanceData(bboxes=boxes + 9, labels=torch.tensor([-1, 1]))
        samples.append(sample)
    return dict(inputs=list(torch.randint(256, (images, 3, 64, 96), dtype=torch.uint8)), data_samples=samples)


def test_a_training_step_waits_for_nothing_but_its_data(models_dir, devices):
    with devices.LogicalGpu() as gpu:
        model = build(models_dir).to(gpu.device)
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
        gpu.syncs.clear()
        data = model.data_preprocessor(batch(4), training=True)
        # image, and boxes and labels of objects and of regions
        assert sum(gpu.syncs.values()) == 5 * 4
        for _ in range(2):  # the optimizer's state is made in the first
            gpu.syncs.clear()
            losses = model(**data, mode="loss")
            loss, log = model.parse_losses(losses)
            wrapper.update_params(loss)
        assert not gpu.syncs
        assert {value.device for value in log.values()} == {gpu.device}


def test_a_tensor_of_the_host_among_the_targets_is_found(models_dir, devices, monkeypatch):
    draw = centernet_targets._draw

    def forgetful(cell, *arguments):
        return draw(cell + torch.arange(2), *arguments)

    with devices.LogicalGpu() as gpu:
        model = build(models_dir).to(gpu.device)
        data = model.data_preprocessor(batch(2), training=True)
        monkeypatch.setattr(centernet_targets, "_draw", forgetful)
        with pytest.raises(devices.DeviceMismatch, match=r"add mixes .*test_centernet_devices\.py"):
            model(**data, mode="loss")


def test_the_heads_losses_compile_without_a_break(models_dir):
    model = build(models_dir)
    data = model.data_preprocessor(batch(2), training=True)
    features = model.extract_feat(data["inputs"])
    expected = model.bbox_head.loss(features, data["data_samples"])
    compiled = torch.compile(model.bbox_head.loss, backend="eager", fullgraph=True)(features, data["data_samples"])
    assert compiled.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(compiled[key], value)
