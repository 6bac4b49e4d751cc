"""Published CenterNet checkpoints load into the detector."""

import pytest
import torch
from mmengine.config import Config

from mmitp.models.checkpoints import convert_centernet_checkpoint, dla_state_dict
from mmitp.registry import MODELS

THEIRS = (
    ("backbone.", "base."),
    ("neck.dla_up.", "dla_up."),
    ("neck.ida_up.", "ida_up."),
    ("bbox_head.heatmap_head.", "hm."),
    ("bbox_head.wh_head.", "wh."),
    ("bbox_head.offset_head.", "reg."),
)


@pytest.fixture
def detector(models_dir):
    config = Config.fromfile(models_dir / "centernet_dla34.py").model
    config.backbone.width = 0.25
    config.neck.in_channels = (16, 32, 64, 128)
    config.bbox_head.update(in_channels=16, feat_channels=32)
    return MODELS.build(config)


def test_centernet_checkpoint_loads_strictly(detector):
    expected = {key: torch.rand(value.shape) for key, value in detector.state_dict().items()}
    published = {"module.base.fc.weight": torch.zeros(1000, 128, 1, 1), "module.base.fc.bias": torch.zeros(1000)}
    for key, value in expected.items():
        ours, theirs = next(pair for pair in THEIRS if key.startswith(pair[0]))
        published["module." + key.replace(ours, theirs).replace("conv_offset", "conv_offset_mask")] = value
    assert "module.ida_up.proj_1.conv.conv_offset_mask.weight" in published
    checkpoint = {"epoch": 140, "state_dict": published}
    detector.load_state_dict(convert_centernet_checkpoint(checkpoint), strict=True)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


def test_flat_state_dict_without_wrapper_prefix_converts_too():
    converted = convert_centernet_checkpoint({"base.level0.0.weight": torch.ones(1), "reg.2.bias": torch.ones(2)})
    assert set(converted) == {"backbone.level0.0.weight", "bbox_head.offset_head.2.bias"}


def test_foreign_keys_are_named():
    with pytest.raises(ValueError, match=r"'dep\.0\.weight' is not a key"):
        convert_centernet_checkpoint({"state_dict": {"dep.0.weight": torch.ones(1)}})


@pytest.mark.parametrize("prefix", ["", "base.", "module.base.", "backbone."])
def test_backbone_part_of_any_checkpoint(prefix: str):
    state = {f"{prefix}level0.0.weight": torch.ones(1), f"{prefix}fc.bias": torch.ones(1)}
    assert set(dla_state_dict({"state_dict": state})) == {"level0.0.weight"}
