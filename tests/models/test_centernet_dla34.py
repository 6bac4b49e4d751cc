"""The whole detector from the configs: parameters, operations, a step of training, prediction."""

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmitp  # noqa: F401
from mmitp.pruning import MacBudget, masked_layers, randomize_masks, share_masks
from mmitp.pruning.check import check_slimming
from mmitp.registry import MODELS

CONFIGS = ("centernet_dla34.py", "centernet_dla34_plain.py")


def small(config: ConfigDict) -> ConfigDict:
    config.backbone.width = 0.25
    config.neck.in_channels = (16, 32, 64, 128)
    config.bbox_head.update(in_channels=16, feat_channels=32)
    return config


def build(models_dir, name: str, narrow: bool = True, **head) -> nn.Module:
    config = Config.fromfile(models_dir / name).model
    config.bbox_head.update(head)
    return MODELS.build(small(config) if narrow else config)


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def macs_by_hand(model: nn.Module, image: torch.Tensor) -> dict[str, int]:
    """Multiplications of every convolution by its shapes, added up by part of the network."""
    from mmcv.ops import ModulatedDeformConv2d

    parts = {"backbone": 0, "neck.dla_up": 0, "neck.ida_up": 0, "bbox_head": 0}
    handles = []

    def hook(part: str):
        def add(layer, inputs, output):
            positions = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
            parts[part] += layer.weight.numel() * positions.shape[-2] * positions.shape[-1]

        return add

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | ModulatedDeformConv2d):
            part = next(part for part in parts if name.startswith(part))
            handles.append(layer.register_forward_hook(hook(part)))
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return parts


# All operations are in proportion to the area for sides that are multiples of 32: counted on one 64x64 tile.
SIZES = {(512, 512): 64, (384, 1280): 120, (384, 1248): 117}
PUBLISHED = {
    (512, 512): (32.7768, 16.052, 7.078, 2.370, 7.277),
    (384, 1280): (61.4565, 30.097, 13.271, 4.444, 13.645),
    (384, 1248): (59.9201, 29.344, 12.940, 4.333, 13.303),
}


def test_parameters_and_operations_equal_the_published_networks(models_dir):
    model = build(models_dir, CONFIGS[0], narrow=False).eval()
    parts = (model.backbone, model.neck.dla_up, model.neck.ida_up, model.bbox_head)
    assert [count(part) for part in parts] == [15_270_832, 3_515_012, 425_324, 444_935]
    assert count(model) == 19_656_103

    image = torch.zeros(1, 3, 64, 64)
    tile = macs_by_hand(model, image)
    for size, tiles in SIZES.items():
        total, *by_part = PUBLISHED[size]
        assert sum(tile.values()) * tiles / 1e9 == pytest.approx(total, abs=0.00005)
        assert [macs * tiles / 1e9 for macs in tile.values()] == pytest.approx(by_part, abs=0.00051)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() == 2 * sum(tile.values())


def test_one_class(models_dir):
    model = build(models_dir, CONFIGS[0], narrow=False, num_classes=1).eval()
    assert count(model) == 19_655_589
    tile = sum(macs_by_hand(model, torch.zeros(1, 3, 64, 64)).values())
    published = {(512, 512): 32.7684, (384, 1280): 61.4407, (384, 1248): 59.9047}
    for size, tiles in SIZES.items():
        assert tile * tiles / 1e9 == pytest.approx(published[size], abs=0.00005)


def test_plain_neck_saves_just_the_offset_convolutions(models_dir):
    deformable, plain = (build(models_dir, name).eval() for name in CONFIGS)
    offsets = [layer for name, layer in deformable.named_modules() if name.endswith("conv_offset")]
    assert len(offsets) == 16
    assert count(deformable) - count(plain) == count(*offsets)
    macs = [sum(macs_by_hand(model, torch.zeros(1, 3, 64, 64)).values()) for model in (deformable, plain)]
    assert macs[0] > macs[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.zeros(1, 3, 64, 64))
    assert counter.get_total_flops() == 2 * macs[1]


def batch(boxes: torch.Tensor) -> dict:
    """Two images, one of them without objects, one smaller than the other."""
    from mmdet.structures import DetDataSample

    samples = []
    shapes = [(60, 96), (64, 90)]
    for shape, image_boxes in zip(shapes, (boxes, boxes[:0]), strict=True):
        sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=image_boxes, labels=torch.zeros(len(image_boxes), dtype=torch.long))
        sample.ignored_instances = InstanceData(
            bboxes=torch.tensor([[0.0, 0.0, 20.0, 20.0]]), labels=torch.tensor([-1])
        )
        samples.append(sample)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, *shape), generator=generator, dtype=torch.uint8) for shape in shapes]
    return dict(inputs=images, data_samples=samples)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_few_steps_lower_the_loss_and_prediction_finds_the_box(models_dir, name: str):
    torch.manual_seed(0)
    model = build(models_dir, name)
    model.init_weights()
    box = torch.tensor([[30.0, 20.0, 66.0, 44.0]])
    data = batch(box)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    history = []
    for step in range(30):
        inputs = model.data_preprocessor(data, training=True)
        result = model(**inputs, mode="loss")
        assert set(result) == {"loss_center_heatmap", "loss_wh", "loss_offset"}
        loss = sum(result.values())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            untrained = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert untrained == []
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 4

    # Few steps leave the running statistics far behind: predict with the batch's own, as training saw them.
    inputs = model.data_preprocessor(data, training=False)
    with torch.no_grad():
        found = model(**inputs, mode="predict")[0].pred_instances
    assert len(found) == 100
    assert found.labels[0] == 0
    corners = found.bboxes[0]
    overlap = (torch.minimum(corners[2:], box[0, 2:]) - torch.maximum(corners[:2], box[0, :2])).clamp(min=0).prod()
    union = (corners[2:] - corners[:2]).prod() + 36 * 24 - overlap
    assert overlap / union > 0.5


def test_with_tied_masks_a_root_drops_the_same_channels_before_and_after_a_block(models_dir):
    config = small(Config.fromfile(models_dir / "centernet_dla34_plain.py").model)
    model = MODELS.build(ConfigDict(config, type="mmitp.MaskedModel", of=config.type)).eval()
    x = torch.randn(1, 3, 64, 96)
    share_masks(model, x)
    randomize_masks(model, 0.5, torch.Generator().manual_seed(0))
    budget = MacBudget(model, x)
    budget.require_tied()
    masks = {name: layer.binary_mask() for name, layer in masked_layers(model).items()}
    for level, width in (("level2", 16), ("level3.tree1", 32), ("level4.tree1", 64), ("level5", 128)):
        root, between = masks[f"backbone.{level}.root.conv"], masks[f"backbone.{level}.tree2.conv1"]
        assert torch.equal(root[:width], root[width : 2 * width])
        assert torch.equal(root[:width], between)
    outcome = check_slimming(model, x, 0.5)
    assert outcome.passed, outcome
