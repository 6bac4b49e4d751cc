"""AdversarialHook on the stack's own models: an mmpretrain classifier with mixup, an mmdet CenterNet."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import mmitp  # noqa: F401  (makes the stack importable without compiled operators)

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
pytest.importorskip("mmdet", reason="mmdet is not installed")

import mmpretrain.models  # noqa: F401
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from mmpretrain.structures import DataSample

sys.path.insert(0, str(Path(__file__).parent))
from toy_detectors import CENTERNET, MEAN, RETINANET, STD

from mmitp.engine.hooks.adversarial_hook import AdversarialHook
from mmitp.engine.hooks.collapse_guard import CollapseGuardHook
from mmitp.engine.hooks.prune_hook import PruneHook

FASTER_RCNN: dict[str, Any] = dict(
    type="mmdet.FasterRCNN",
    data_preprocessor=RETINANET["data_preprocessor"],
    backbone=dict(type="mmdet.ResNet", depth=18, base_channels=8, stem_channels=8, norm_eval=False),
    neck=dict(type="mmdet.FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
    rpn_head=dict(
        type="mmdet.RPNHead",
        in_channels=8,
        feat_channels=8,
        anchor_generator=dict(type="mmdet.AnchorGenerator", scales=[4], ratios=[0.5, 1.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type="mmdet.DeltaXYWHBBoxCoder"),
        loss_cls=dict(type="mmdet.CrossEntropyLoss", use_sigmoid=True),
        loss_bbox=dict(type="mmdet.L1Loss"),
    ),
    roi_head=dict(
        type="mmdet.StandardRoIHead",
        bbox_roi_extractor=dict(
            type="mmdet.SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
            out_channels=8,
            featmap_strides=[4, 8, 16, 32],
        ),
        bbox_head=dict(
            type="mmdet.Shared2FCBBoxHead",
            in_channels=8,
            fc_out_channels=8,
            num_classes=3,
            bbox_coder=dict(type="mmdet.DeltaXYWHBBoxCoder"),
            loss_cls=dict(type="mmdet.CrossEntropyLoss"),
            loss_bbox=dict(type="mmdet.L1Loss"),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(type="mmdet.MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(
                type="mmdet.RandomSampler", num=32, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False
            ),
            allowed_border=-1,
            pos_weight=-1,
        ),
        rpn_proposal=dict(nms_pre=50, max_per_img=20, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(type="mmdet.MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
            sampler=dict(
                type="mmdet.RandomSampler", num=16, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True
            ),
            pos_weight=-1,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=50, max_per_img=20, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=10),
    ),
)


class Scenes(Dataset):
    """Two images of different sizes with one box each."""

    metainfo: dict = {}  # noqa: RUF012
    sizes = ((48, 64), (64, 40))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        height, width = self.sizes[index]
        image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(index)).byte()
        sample = DetDataSample(metainfo=dict(img_shape=(height, width), img_id=index, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8.0, 30.0, 28.0]]), labels=torch.tensor([index]))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        return {"inputs": image, "data_samples": sample}


class Photos(Dataset):
    """Four 8x8 images of four classes."""

    metainfo: dict = {}  # noqa: RUF012

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(index)).byte()
        return {"inputs": image, "data_samples": DataSample().set_gt_label(index)}


def train(
    work_dir: Path,
    model: dict,
    dataset: Dataset,
    hook: AdversarialHook,
    collate: str,
    epochs: int = 1,
    watch: Callable[[Runner], None] | None = None,
    guards: tuple[CollapseGuardHook, ...] = (),
) -> tuple[Runner, list]:
    """Epochs of one iteration; what went into the model in ``loss`` mode, where ``watch`` is called first."""
    seen: list[tuple[torch.Tensor, list]] = []
    runner = Runner(
        model=ConfigDict(copy.deepcopy(model)),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=dataset,
            batch_size=len(dataset),  # type: ignore[arg-type]
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type=collate),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e-3)),
        custom_hooks=[hook, *guards],
        randomness=dict(seed=0),
        default_scope="mmdet",
        experiment_name="_".join(work_dir.parts[-3:]),
        log_level="WARNING",
    )
    loss = runner.model.loss

    def recorded(inputs: torch.Tensor, data_samples: list) -> Any:
        seen.append((inputs.detach().clone(), copy.deepcopy(data_samples)))
        if watch is not None:
            watch(runner)
        return loss(inputs, data_samples)

    runner.model.loss = recorded
    runner.train()
    return runner, seen


def mixing(**loss: Any) -> dict[str, Any]:
    """A classifier that is trained on mixed images."""
    return dict(
        type="mmpretrain.ImageClassifier",
        data_preprocessor=dict(
            type="mmpretrain.ClsDataPreprocessor",
            mean=MEAN,
            std=STD,
            num_classes=4,
            batch_augments=dict(augments=dict(type="Mixup", alpha=1.0)),
        ),
        backbone=dict(type="mmitp.ResNetCifar", depth=8),
        neck=dict(type="mmpretrain.GlobalAveragePooling"),
        head=dict(
            type="mmpretrain.LinearClsHead",
            num_classes=4,
            in_channels=64,
            loss=dict(type="mmpretrain.CrossEntropyLoss", **loss),
        ),
    )


def test_classifier_with_mixup(tmp_path: Path) -> None:
    """The attack sees the mixed images and the soft labels the training sees."""
    model = mixing(use_soft=True)
    _, seen = train(tmp_path, model, Photos(), AdversarialHook(eps=8, alpha=10), "default_collate")
    (start, first), (trained, second) = seen
    assert [sample.gt_score.tolist() for sample in first] == [sample.gt_score.tolist() for sample in second]
    assert any(0 < sample.gt_score.max() < 1 for sample in first)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    moved = ((trained - start) * std).abs()
    assert moved.max() <= 16 + 1e-3  # two points of one ball of radius 8
    assert moved.mean() > 2


def test_mixup_with_plain_cross_entropy_is_probed_and_slimmed_in_training(tmp_path: Path) -> None:
    """Outside training mmpretrain hands out one-hot labels as integers, which torch's cross-entropy does not take."""
    model = dict(mixing(), type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
    prune = dict(type="mmitp.PruneHook", target=0.7, begin=0, end=1, slim_at_end=True)
    guards: Any = (CollapseGuardHook(source="train", num_batches=1), prune)
    runner, _ = train(tmp_path, model, Photos(), AdversarialHook(eps=8), "default_collate", 2, guards=guards)
    guard, pruned = (next(h for h in runner.hooks if isinstance(h, kind)) for kind in (CollapseGuardHook, PruneHook))
    assert len(guard.history) == 2
    assert pruned.slimmed is not None


@pytest.mark.parametrize(
    ("model", "losses"),
    [
        pytest.param(CENTERNET, None, id="centernet"),
        pytest.param(CENTERNET, ["loss_center_heatmap"], id="centernet-heatmap"),
        pytest.param(CENTERNET, ["loss_wh", "loss_offset"], id="centernet-boxes"),
        pytest.param(RETINANET, None, id="retinanet"),
        pytest.param(FASTER_RCNN, None, id="faster-rcnn"),
    ],
)
def test_detector_raises_its_own_loss_inside_the_images_only(
    tmp_path: Path, model: dict, losses: list[str] | None
) -> None:
    hook = AdversarialHook(eps=4, alpha=5, losses=losses, batchnorm="batch")
    runner, seen = train(tmp_path, model, Scenes(), hook, "pseudo_collate")
    start, trained = seen[0][0], seen[-1][0]
    assert len(seen) == 2
    assert trained.shape == (2, 3, 64, 64)
    assert (trained[0, :, 48:] == 0).all()  # the preprocessor pads with 0
    assert (trained[1, :, :, 40:] == 0).all()
    std = torch.tensor(STD).view(1, 3, 1, 1)
    items = [Scenes()[index] for index in range(2)]
    data = {key: [item[key] for item in items] for key in items[0]}
    clean = runner.model.data_preprocessor(data, False)["inputs"]
    assert ((trained - clean) * std).abs().max() <= 4 + 1e-3
    assert not torch.equal(start, trained)
    # Boxes are those of the data set, whatever the attack's passes did with their copies.
    for index, sample in enumerate(seen[-1][1]):
        assert torch.equal(sample.gt_instances.bboxes, Scenes()[index]["data_samples"].gt_instances.bboxes)
        assert sample.gt_instances.labels.tolist() == [index]


def test_the_attack_on_a_two_stage_detector_leaves_statistics_and_gradients(tmp_path: Path) -> None:
    """Two iterations of two passes each: only training's own passes move BatchNorm, and no gradient is there before."""
    counts, gradients, weights = [], [], []

    def watch(runner: Runner) -> None:
        norms = [module for module in runner.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        counts.append({int(norm.num_batches_tracked) for norm in norms})
        gradients.extend(p.grad for p in runner.model.parameters() if p.grad is not None and p.grad.any())
        weights.append(runner.model.backbone.conv1.weight.detach().clone())

    hook = AdversarialHook(eps=4, alpha=5, batchnorm="batch")
    _, seen = train(tmp_path, FASTER_RCNN, Scenes(), hook, "pseudo_collate", epochs=2, watch=watch)
    assert counts == [{0}, {0}, {1}, {1}]
    assert not gradients
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[2][0], seen[3][0])


@pytest.mark.parametrize(
    "model", [pytest.param(CENTERNET, id="centernet"), pytest.param(FASTER_RCNN, id="faster-rcnn")]
)
def test_a_guarded_detector_trains_as_it_would_unwatched_and_its_probes_repeat(tmp_path: Path, model: dict) -> None:
    """Proposals that a loss samples are drawn anew for each probe, from its own seed."""
    hook = AdversarialHook(eps=4, alpha=5, batchnorm="batch")
    guard = CollapseGuardHook(num_batches=1, steps=1, action="restore")
    plain, _ = train(tmp_path / "plain", model, Scenes(), hook, "pseudo_collate", epochs=2)
    watched, _ = train(tmp_path / "watched", model, Scenes(), hook, "pseudo_collate", epochs=2, guards=(guard,))
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[key]), key
    guard.probe(watched, 2)
    assert len(guard.history) == 3
    assert guard.history[-1] == guard.history[-2]
    assert guard.history[0]["single"] > 0
