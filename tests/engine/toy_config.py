"""A run so small that tests can have many: a config, as tools/train.py reads it, of a network of two convolutions."""

import itertools

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset

RUNS = itertools.count()  # mmengine keeps loggers by the experiment's name


@MODELS.register_module()
class TinyNet(BaseModel):
    """Learns which half of an 8x8 image is brighter."""

    def __init__(self):
        super().__init__(data_preprocessor=TinyPreprocessor())
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.body(self.norm(self.stem(inputs)).relu()).relu()
        x = self.fc(x.mean((2, 3)))
        if mode == "loss":
            return dict(loss=nn.functional.cross_entropy(x, data_samples))
        return x if mode == "tensor" else list(x.argmax(1) == data_samples)


class TinyPreprocessor(BaseDataPreprocessor):
    """What AdversarialHook wants: images of pixels in [0, 255], normalised."""

    mean, std, _enable_normalize = torch.tensor([128.0] * 3), torch.tensor([50.0] * 3), True

    def forward(self, data, training=False):
        return dict(inputs=(torch.stack(data["inputs"]) - 128) / 50, data_samples=torch.stack(data["label"]))


@DATASETS.register_module()
class TinyData(Dataset):
    metainfo = {}

    def __init__(self, images=40):
        x = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.y = (x[:, :, :4].mean((1, 2, 3)) > x[:, :, 4:].mean((1, 2, 3))).long()
        self.x = (x * 50 + 128).clamp(0, 255)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return dict(inputs=self.x[i], label=self.y[i])


@METRICS.register_module()
class TinyAccuracy(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(accuracy=float(torch.stack(results).float().mean()))


def tiny_config(work_dir, epochs=6, hook=None, hooks=(), checkpoint=None, accumulate=1, **more):
    """40 images in batches of 8: five iterations an epoch. Pruned in epochs 1 and 2, saved after every epoch."""
    prune = dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=1, end=3, **(hook or {}))
    loader = dict(batch_size=8, num_workers=0, dataset=dict(type="TinyData"))
    return Config(
        dict(
            model=dict(type="mmitp.MaskedModel", of="TinyNet"),
            work_dir=str(work_dir),
            train_dataloader=dict(loader, sampler=dict(type="DefaultSampler", shuffle=True)),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(
                type="OptimWrapper",
                optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-3),
                accumulative_counts=accumulate,
            ),
            param_scheduler=dict(type="MultiStepLR", milestones=[2, 4]),
            custom_hooks=[prune, *hooks],
            default_hooks=dict(
                logger=dict(type="LoggerHook", interval=1),
                checkpoint=dict(type="CheckpointHook", interval=1, **(checkpoint or {})),
            ),
            default_scope="mmengine",
            experiment_name=f"tiny{next(RUNS)}",
            randomness=dict(seed=0),
            log_level="WARNING",
            **more,
        )
    )


VALIDATION = dict(
    val_dataloader=dict(
        batch_size=8,
        num_workers=0,
        dataset=dict(type="TinyData", images=16),
        sampler=dict(type="DefaultSampler", shuffle=False),
    ),
    val_evaluator=dict(type="TinyAccuracy"),
    val_cfg=dict(),
)


def same(a, b):
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b
