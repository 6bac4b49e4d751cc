"""PruneHook against a latency or a parameter target, in real Runners on the CPU."""

import itertools
import json

import pytest
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmitp.engine.hooks import PruneHook
from mmitp.pruning import mask_model, masked_layers

RUNS = itertools.count()  # mmengine keeps loggers by the experiment's name


class Toy(BaseModel):
    """Two convolutions on 8x8 images and a linear classifier; the second convolution's 8 inputs carry masks."""

    def __init__(self):
        super().__init__(data_preprocessor=Stack())
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 2)
        mask_model(self)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.fc(self.body(self.stem(inputs).relu()).relu().mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(x, data_samples)) if mode == "loss" else x


class Stack(BaseDataPreprocessor):
    def forward(self, data, training=False):
        return dict(inputs=torch.stack(data["inputs"]), data_samples=torch.stack(data["label"]))


class Brightness(Dataset):
    metainfo = {}
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return dict(inputs=self.x[i], label=(self.x[i].mean() > 0).long())


#: k kept channels take 100 k in the stem and 1000 k in the body; the classifier takes 50, the rest 150.
TABLE = dict(
    format=1,
    shape=[8, 8],
    constant=150.0,
    layers={
        name: dict(
            n_in=n_in, n_out=n_out, pair_macs=pair_macs, inputs=inputs, outputs=outputs, ns=ns,
            gather=0.0, scatter=0.0, element=0.0,
        )
        for name, n_in, n_out, pair_macs, inputs, outputs, ns in (
            ("stem", 3, 8, 576, [3], [1, 8], [[100.0, 800.0]]),
            ("body", 8, 8, 576, [1, 8], [8], [[1000.0], [8000.0]]),
            ("fc", 8, 2, 1, [8], [2], [[50.0]]),
        )
    },
)  # fmt: skip


def train(work_dir, **hook):
    torch.manual_seed(0)
    settings = dict(target=0.5, b=0, begin=0, end=2) | hook
    runner = Runner(
        model=Toy(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=4, dataset=Brightness(), sampler=dict(type="DefaultSampler", shuffle=True), num_workers=0
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01)),
        custom_hooks=[dict(type="mmitp.PruneHook", **settings)],
        default_scope="mmengine",
        experiment_name=f"cost{next(RUNS)}",
        randomness=dict(seed=0),
    )
    runner.train()
    hook = next(h for h in runner.hooks if isinstance(h, PruneHook))
    return runner, hook, json.loads((work_dir / "pruning.json").read_text())


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(TABLE))
    return str(file)


@pytest.mark.parametrize(("margin", "kept"), [(0.0, 3), (0.25, 2)])
def test_masks_freeze_under_the_latency_target(tmp_path, table, margin, kept):
    """1100 k + 200 of 9000 ns: 3 channels take 3500; with a quarter of the savings not counted, 2 take 4050."""
    runner, hook, report = train(tmp_path, cost=dict(type="latency", table=table, margin=margin))
    assert int(masked_layers(runner.model)["body"].prune_pattern.sum()) == kept
    cost = 1100 * kept + 200
    assert report["ratio"] == pytest.approx((cost + margin * (9000 - cost)) / 9000)
    assert report["cost"] == "latency"
    # the operations are told beside: k of 8 channels in the first two layers, and the classifier
    assert report["macs_kept"] == 576 * kept * (3 + 8) + 16


def test_the_closed_loop_steers_the_latency_to_its_target(tmp_path, table):
    _, hook, report = train(tmp_path, b="auto", cost=dict(type="latency", table=table, margin=0.0))
    assert report["ratio"] <= 0.5
    assert report["ratio_before"] < 1


def test_training_goes_on_slimmed_and_keeps_telling_the_latency(tmp_path, table):
    runner, hook, report = train(tmp_path, slim_at_end=True, cost=dict(type="latency", table=table, margin=0.0))
    assert runner.model.body.in_channels == 3
    assert runner.message_hub.get_scalar("train/ops_kept").current() == pytest.approx(3500 / 9000)


def test_masks_freeze_under_the_parameter_target(tmp_path):
    """224 + 584 + 18 parameters; each channel dropped takes 28 of the stem's and 72 of the body's with it."""
    runner, hook, report = train(tmp_path, target=0.6, cost="params")
    assert (report["params_dense"], report["params_kept"]) == (826, 426)
    assert report["ratio"] == 426 / 826


def test_a_table_of_another_size_stops_the_run_at_once(tmp_path, table):
    with pytest.raises(ValueError, match=r"does not fit layer 'stem'.*\[8, 8\]"):
        train(tmp_path, input_shape=(16, 16), cost=dict(type="latency", table=table))
