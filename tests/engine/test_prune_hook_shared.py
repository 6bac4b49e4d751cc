"""PruneHook with masks shared by the readers of a stream and kept channels in multiples, in real Runners on the CPU."""

import itertools

import pytest
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmitp.engine.hooks import PruneHook
from mmitp.pruning import MacBudget, masked_layers, slim
from mmitp.pruning.slim import SlimLayer

RUNS = itertools.count()


class Preprocessor(BaseDataPreprocessor):
    def forward(self, data, training=False):
        return dict(inputs=torch.stack(data["inputs"]), data_samples=torch.stack(data["label"]))


@MODELS.register_module(force=True)
class ToyResidual(BaseModel):
    """Two residual blocks of 16 channels on 8x8 images."""

    def __init__(self):
        super().__init__(data_preprocessor=Preprocessor())
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a1, self.b1 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.a2, self.b2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.stem(inputs).relu()
        x = (x + self.norm(self.b1(self.a1(x).relu()))).relu()
        x = (x + self.b2(self.a2(x).relu())).relu()
        x = self.head(x).mean((2, 3))
        return x if mode == "tensor" else dict(loss=nn.functional.cross_entropy(x, data_samples))


class Noise(Dataset):
    metainfo = {}

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return dict(inputs=torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), label=torch.tensor(i % 2))


def make_runner(work_dir, paramwise=None, **hook):
    optimizer = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9))
    if paramwise is not None:
        optimizer["paramwise_cfg"] = paramwise
    return Runner(
        model=dict(type="mmitp.MaskedModel", of="ToyResidual", prune=dict(share="stream", shape=(8, 8))),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=8, dataset=Noise(), sampler=dict(type="DefaultSampler", shuffle=True), num_workers=0
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        optim_wrapper=optimizer,
        custom_hooks=[
            dict(type="mmitp.PruneHook", begin=0, end=2, **hook),
            dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1),
        ],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        default_scope="mmengine",
        experiment_name=f"shared{next(RUNS)}",
        randomness=dict(seed=0),
    )


def test_a_run_ends_with_one_narrow_stream_in_multiples(tmp_path):
    runner = make_runner(tmp_path, target=0.6, b="auto", divisor=4)
    runner.train()
    hook = next(h for h in runner.hooks if isinstance(h, PruneHook))
    layers = masked_layers(runner.model)
    assert layers["a1"].prune_mask is layers["a2"].prune_mask is layers["head"].prune_mask
    assert all(torch.equal(layers["a1"].prune_pattern, layers[name].prune_pattern) for name in ("a2", "head"))
    assert hook.budget.kept_macs() <= 0.6 * hook.budget.dense_macs
    assert all(row.in_kept % 4 == 0 for row in hook.budget.table() if row.name != "stem")
    saved = torch.load(tmp_path / "epoch_3.pth", weights_only=False)
    for name, layer in layers.items():
        assert torch.equal(saved["ema_state_dict"][f"module.{name}.prune_pattern"], layer.prune_pattern)
    x = torch.randn(1, 3, 8, 8)
    small = slim(runner.model, x, MacBudget(runner.model, x))
    assert not any(isinstance(m, SlimLayer) for m in small.modules())
    assert small.stem.out_channels == int(layers["head"].prune_pattern.sum()) < 16


def test_parameter_wise_options_need_the_duplicates_passed_by(tmp_path):
    runner = make_runner(tmp_path, dict(bias_lr_mult=2.0, bypass_duplicate=True), target=0.6, b=0)
    runner.train()
    with pytest.raises(ValueError, match="more than one parameter group"):
        make_runner(tmp_path, dict(bias_lr_mult=2.0), target=0.6, b=0).train()


def test_a_target_out_of_reach_in_multiples_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be reached: with 16 input channel"):
        make_runner(tmp_path, target=0.6, divisor=16).train()
    with pytest.raises(ValueError, match="divisor"):
        PruneHook(target=0.5, divisor=0)
    with pytest.raises(ValueError, match="'stream'"):
        MODELS.build(dict(type="mmitp.MaskedModel", of="ToyResidual", prune=dict(share="all")))
