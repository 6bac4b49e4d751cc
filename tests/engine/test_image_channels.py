"""Images of any number of channels: taken from the checkpoint, else from the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine import Config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import mmitp  # noqa: F401
from mmitp.engine.checkpoint import known_input
from mmitp.engine.example import blank_example, image_channels
from mmitp.engine.export import export_checkpoint
from mmitp.engine.hooks.prune_hook import STATE_KEY
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.models.report import build_masked, random_batch
from mmitp.pruning import freeze_masks, randomize_masks


class Net(nn.Module):
    """A model whose stem reads the image, every second pixel of it (as YOLOX), or three of its channels."""

    def __init__(self, stem: int, means: int | None, form: str = "plain") -> None:
        super().__init__()
        self.data_preprocessor = BaseDataPreprocessor()
        if means is not None:
            self.data_preprocessor.register_buffer("mean", torch.zeros(means, 1, 1))
        self.stem, self.depth, self.form = nn.Conv2d(stem, 4, 1), nn.Conv2d(1, 4, 1), form
        self.calls = 0

    def forward(self, inputs: Tensor, data_samples: None = None, mode: str = "tensor") -> Tensor:
        self.calls += 1
        if self.form == "patches":
            return self.stem(F.pixel_unshuffle(inputs, 2))
        if self.form == "two stems":
            return self.stem(inputs[:, :3]) + self.depth(inputs[:, 3:])
        return self.stem(inputs)


@pytest.mark.parametrize(
    ("stem", "means", "form", "channels", "calls"),
    [
        (3, 3, "plain", 3, 0),
        (3, None, "plain", 3, 0),
        (3, 1, "plain", 3, 0),  # one mean for all channels
        (1, 1, "plain", 1, 0),
        (4, 4, "plain", 4, 0),
        (4, None, "plain", 4, 1),
        (12, None, "patches", 3, 2),  # 12 is tried first
        (16, 4, "patches", 4, 1),
        (3, 4, "two stems", 4, 1),
    ],
)
def test_the_models_channels(stem: int, means: int | None, form: str, channels: int, calls: int) -> None:
    net = Net(stem, means, form)
    assert image_channels(net, (4, 4)) == channels
    assert net.calls == calls
    assert net.training
    assert blank_example(net, (4, 4))["inputs"].shape == (1, channels, 4, 4)
    assert blank_example(net, (4, 4), 7)["inputs"].shape == (1, 7, 4, 4)


def test_a_model_that_runs_with_no_such_number_is_named() -> None:
    with pytest.raises(ValueError, match="cannot tell how many channels the images of Net have; tried 5: RuntimeError"):
        image_channels(Net(5, None, "patches"), (4, 4))


def config(channels: int) -> Config:
    cfg = Config.fromfile(Path(__file__).parents[2] / "configs" / "_base_" / "models" / "resnet20_cifar.py")
    cfg.model = dict(
        type="mmitp.MaskedModel",
        of="mmpretrain.ImageClassifier",
        backbone=dict(
            type="mmpretrain.ResNet_CIFAR",
            depth=18,
            base_channels=8,
            stem_channels=8,
            in_channels=channels,
            out_indices=(3,),
        ),
        neck=dict(type="mmpretrain.GlobalAveragePooling"),
        head=dict(type="mmpretrain.LinearClsHead", num_classes=4, in_channels=64),
    )
    cfg.data_preprocessor = dict(num_classes=4, mean=[127.0] * channels, std=[60.0] * channels)
    cfg.default_scope = "mmpretrain"
    return cfg


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kept", [True, False])
def test_such_checkpoints_are_slimmed_and_exported(channels: int, kept: bool, tmp_path: Path) -> None:
    cfg = config(channels)
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    net = MODELS.build(cfg.model)
    randomize_masks(net, 0.5, torch.Generator().manual_seed(0))
    freeze_masks(net)
    state = dict(input_shape=(16, 16), channels=channels) if kept else dict(input_shape=(16, 16))
    checkpoint = str(tmp_path / "m.pth")
    torch.save({"state_dict": net.state_dict(), STATE_KEY: state}, checkpoint)
    report = slim_checkpoint(cfg, checkpoint, str(tmp_path / "slim"))
    assert report.macs_slim < report.macs_dense
    assert known_input(torch.load(report.weights)) == ((16, 16), channels)
    exported = export_checkpoint(Config.fromfile(report.config), report.weights, str(tmp_path / "m.pt"))
    assert f"x {channels} x 16 x 16" in exported.text()


def test_reports_and_shared_masks_take_them_from_the_model() -> None:
    cfg = config(4)
    cfg.model.prune = dict(share="stream", shape=(16, 16))
    net = build_masked(cfg)
    batch = random_batch(net, (16, 16), 2, torch.Generator().manual_seed(0))
    assert [tuple(image.shape) for image in batch["inputs"]] == [(4, 16, 16)] * 2
