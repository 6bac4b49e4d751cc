"""Evaluation attacks on detectors: coordinates of the ground truth, objectives, and what the metric reads."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmitp  # noqa: F401  (makes the stack importable without compiled operators)

pytest.importorskip("mmdet", reason="mmdet is not installed")

import mmdet.datasets.transforms
import mmdet.models  # noqa: F401
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

sys.path.insert(0, str(Path(__file__).parent))
from toy_detectors import CENTERNET, RETINANET

from mmitp.datasets.scenes import write_scenes
from mmitp.engine.attack import training_loss
from mmitp.engine.detector_attack import boxes_are_original, detector_loss, input_samples, own_detections, score_logits
from mmitp.engine.example import blank_example
from mmitp.engine.robust_eval import EvalAttack, attacked, evaluate
from mmitp.pruning import freeze_masks, mask_model, randomize_masks, slim

LOAD = dict(type="LoadImageFromFile", backend_args=None)
BOXES = dict(type="LoadAnnotations", with_bbox=True)
PACK = dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "border"))
GEOMETRY: dict[str, dict[str, Any]] = {
    "resize": dict(type="Resize", scale=(144, 200), keep_ratio=True),
    "stretch": dict(type="Resize", scale=(160, 72), keep_ratio=False),
    "crop": dict(type="mmitp.ScaleShiftCrop", size=(128, 32)),
}
OBJECTIVES = ["truth", "own", "vanishing", "fabrication"]


class KeptGroundTruth(BaseMetric):
    """Keeps what a metric is given to read."""

    default_prefix = "kept"

    def process(self, data_batch: Any, data_samples: list) -> None:
        for sample in data_samples:
            self.results.append((copy.deepcopy(sample["gt_instances"]), copy.deepcopy(sample["ignored_instances"])))

    def compute_metrics(self, results: list) -> dict:
        KeptGroundTruth.last = results  # type: ignore[attr-defined]
        return {"images": len(results)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_scenes(tmp_path_factory.mktemp("scenes"), 4, seed=1, size=(192, 64), val_fraction=0.5))


def dataset_config(scenes: str, *pipeline: dict) -> dict:
    return dict(
        type="mmitp.KittiDataset",
        data_root=scenes,
        ann_file="ImageSets/trainval.txt",
        test_mode=True,
        pipeline=[*pipeline, PACK],
    )


def build_dataset(scenes: str, *pipeline: dict) -> Any:
    init_default_scope("mmdet")
    return DATASETS.build(copy.deepcopy(dataset_config(scenes, *pipeline)))


def build_model(cfg: dict, seed: int = 0) -> Any:
    init_default_scope("mmdet")
    torch.manual_seed(seed)
    model = MODELS.build(ConfigDict(copy.deepcopy(cfg)))
    model.init_weights()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def make_runner(work_dir: Path, model: Any, scenes: str, *pipeline: dict) -> Runner:
    return Runner(
        model=model,
        work_dir=str(work_dir),
        test_dataloader=dict(
            dataset=copy.deepcopy(dataset_config(scenes, *(pipeline or (LOAD, GEOMETRY["crop"], BOXES)))),
            batch_size=3,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
        ),
        test_cfg=dict(),
        test_evaluator=[dict(type="mmitp.KittiMetric", data_root=scenes), dict(type=KeptGroundTruth)],
        default_scope="mmdet",
        experiment_name="_".join(work_dir.parts[-3:]),
        log_level="WARNING",
    )


def batch_of(model: Any, dataset: Any, indices: tuple[int, ...] = (0, 1)) -> dict:
    items = [dataset[index] for index in indices]
    return model.data_preprocessor({key: [item[key] for item in items] for key in items[0]}, False)


def sample_with(boxes: list, **meta: Any) -> DetDataSample:
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes), labels=torch.arange(len(boxes)))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample


# ---- coordinates


def test_boxes_are_scaled_moved_clipped_and_dropped_on_a_copy() -> None:
    sample = sample_with(
        [[10.0, 20.0, 40.0, 60.0], [180.0, 20.0, 300.0, 60.0], [210.0, 0.0, 250.0, 20.0]],
        ori_shape=(100, 300),
        img_shape=(25, 100),
        scale_factor=(0.5, 0.25),
    )
    before = copy.deepcopy(sample)
    (mapped,) = input_samples([sample], original=True)
    assert mapped.gt_instances.bboxes.tolist() == [[5.0, 5.0, 20.0, 15.0], [90.0, 5.0, 100.0, 15.0]]
    assert mapped.gt_instances.labels.tolist() == [0, 1]
    assert torch.equal(sample.gt_instances.bboxes, before.gt_instances.bboxes)
    (copied,) = input_samples([sample], original=False)
    assert torch.equal(copied.gt_instances.bboxes, before.gt_instances.bboxes)


def test_a_canvas_and_a_homography_are_followed() -> None:
    """Scaled by 2 and put 7 from the left and 3 from the top; or flipped in a width of 50."""
    canvas = sample_with(
        [[1.0, 2.0, 5.0, 6.0]],
        ori_shape=(20, 20),
        img_shape=(63, 63),
        scale_factor=(2.0, 2.0),
        border=np.array([3, 43, 7, 47], dtype=np.float32),
    )
    assert input_samples([canvas], original=True)[0].gt_instances.bboxes.tolist() == [[9.0, 7.0, 17.0, 15.0]]
    flipped = sample_with(
        [[1.0, 2.0, 5.0, 6.0]],
        ori_shape=(20, 50),
        img_shape=(20, 50),
        flip=True,
        homography_matrix=np.array([[-1.0, 0, 50], [0, 1, 0], [0, 0, 1]], dtype=np.float32),
    )
    assert input_samples([flipped], original=True)[0].gt_instances.bboxes.tolist() == [[45.0, 2.0, 49.0, 6.0]]


def test_boxes_that_cannot_be_mapped_are_an_error() -> None:
    with pytest.raises(ValueError, match="'scale_factor'"):
        input_samples([sample_with([[0.0, 0, 1, 1]], ori_shape=(20, 20), img_shape=(10, 10))], original=True)
    with pytest.raises(ValueError, match="homography_matrix"):
        input_samples([sample_with([[0.0, 0, 1, 1]], img_shape=(10, 10), flip=True)], original=True)
    bare = DetDataSample(gt_instances=InstanceData())
    with pytest.raises(ValueError, match="LoadAnnotations"):
        input_samples([bare], original=True)


@pytest.mark.parametrize("name", sorted(GEOMETRY))
def test_mapped_boxes_are_those_of_a_pipeline_that_moves_them_along(scenes: str, name: str) -> None:
    late = build_dataset(scenes, LOAD, GEOMETRY[name], BOXES)
    early = build_dataset(scenes, LOAD, BOXES, GEOMETRY[name])
    assert boxes_are_original(late)
    assert not boxes_are_original(early)
    boxes = 0
    for index in range(len(late)):
        (mapped,) = input_samples([late[index]["data_samples"]], original=True)
        expected = early[index]["data_samples"]
        for field in ("gt_instances", "ignored_instances"):
            ours, theirs = mapped.get(field), expected.get(field)
            torch.testing.assert_close(ours.bboxes, theirs.bboxes.tensor, rtol=0, atol=1e-3)
            assert ours.labels.tolist() == theirs.labels.tolist()
            boxes += len(ours)
    assert boxes > 4


def test_a_pipeline_that_leaves_no_answer_is_an_error(scenes: str) -> None:
    with pytest.raises(ValueError, match="before and after"):
        boxes_are_original(build_dataset(scenes, LOAD, GEOMETRY["resize"], BOXES, GEOMETRY["crop"]))
    with pytest.raises(ValueError, match="no transform pipeline"):
        boxes_are_original([1, 2])


# ---- objectives


@pytest.mark.parametrize("cfg", [CENTERNET, RETINANET], ids=["centernet", "retinanet"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_attack_raises_its_objective_and_leaves_the_metric_its_ground_truth(
    tmp_path: Path, scenes: str, cfg: dict, objective: str
) -> None:
    model = build_model(cfg)
    runner = make_runner(tmp_path, model, scenes)
    attack = EvalAttack("pgd", steps=3, alpha=2.0, objective=objective, score_thr=0.0)  # type: ignore[arg-type]
    runner.test()
    clean_truth = KeptGroundTruth.last  # type: ignore[attr-defined]
    report = evaluate(runner, attack, [4.0])
    attacked_truth = KeptGroundTruth.last  # type: ignore[attr-defined]
    assert report.attacked[0].keys() == report.clean.keys()
    assert "kitti/mAP_R40_moderate" in report.clean
    assert report.largest[0] == pytest.approx(4.0, abs=1e-3)

    dataset = build_dataset(scenes, LOAD, GEOMETRY["crop"], BOXES)
    for index, pair in enumerate(zip(clean_truth, attacked_truth, strict=True)):
        sample = dataset[index]["data_samples"]
        for which, field in enumerate(("gt_instances", "ignored_instances")):
            read = [instances[which]["bboxes"] for instances in pair]
            assert torch.equal(read[0], read[1])
            assert torch.equal(read[0], sample.get(field).bboxes.tensor)

    data = batch_of(model, dataset)
    loss = detector_loss(model, data, objective, original=True, score_thr=0.0)  # type: ignore[arg-type]
    with attacked(model, attack, 4.0, dataset):
        moved = batch_of(model, dataset)["inputs"]
    with torch.no_grad():
        assert loss(moved).sum() > loss(data["inputs"]).sum()


def test_own_detections_are_the_labels_in_input_coordinates(scenes: str) -> None:
    """The image is scaled by 128 / 192; mmdet brings detections back to the original by that factor."""
    model = build_model(CENTERNET)
    data = batch_of(model, build_dataset(scenes, LOAD, GEOMETRY["crop"]))  # no annotations needed
    before = copy.deepcopy(data["data_samples"])
    labelled = own_detections(model, data, score_thr=0.0)
    with torch.no_grad():
        found = model.predict(data["inputs"], copy.deepcopy(data["data_samples"]), rescale=True)
    for sample, detections in zip(labelled, found, strict=True):
        boxes = detections.pred_instances.bboxes * (128 / 192)
        boxes = boxes.minimum(torch.tensor([128.0, 32.0, 128.0, 32.0]))  # the lower quarter is cropped
        torch.testing.assert_close(sample.gt_instances.bboxes, boxes, rtol=0, atol=1e-3)
        assert torch.equal(sample.gt_instances.labels, detections.pred_instances.labels)
        assert len(sample.gt_instances) == 10
    highest = max(sample.pred_instances.scores.max().item() for sample in found)
    assert sum(len(sample.gt_instances) for sample in own_detections(model, data, highest)) == 0
    assert "pred_instances" not in data["data_samples"][0]
    assert set(before[0].keys()) == set(data["data_samples"][0].keys())  # a data sample's keys are in no order


def test_scores_of_a_centernet_are_taken_back_before_the_sigmoid(scenes: str) -> None:
    model = build_model(CENTERNET)
    x = batch_of(model, build_dataset(scenes, LOAD, GEOMETRY["crop"]))["inputs"]
    with torch.no_grad():
        (logits,) = score_logits(model)(x)
        expected = model.bbox_head.heatmap_head(model.extract_feat(x)[0])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_several_restarts_pick_the_worst_run_of_each_image(scenes: str) -> None:
    model = build_model(CENTERNET)
    dataset = build_dataset(scenes, LOAD, GEOMETRY["crop"], BOXES)
    data = batch_of(model, dataset)
    loss = detector_loss(model, data, "truth", original=True, per_image=True)
    worst = []
    for restarts in (2, 5):
        with attacked(model, EvalAttack("pgd", steps=1, restarts=restarts), 4.0, dataset):
            worst.append(loss(batch_of(model, dataset)["inputs"]).detach())
    assert worst[0].shape == (2,)
    assert (worst[1] >= worst[0] - 1e-5).all()
    assert (worst[1] > worst[0] + 1e-5).any()


def test_an_image_alone_has_the_training_loss_of_a_batch_of_one(scenes: str) -> None:
    model = build_model(RETINANET)
    data = batch_of(model, build_dataset(scenes, LOAD, BOXES, GEOMETRY["crop"]))
    alone = {"inputs": data["inputs"][1:], "data_samples": data["data_samples"][1:]}
    with torch.no_grad():
        both = detector_loss(model, data, "truth", per_image=True)(data["inputs"])
        torch.testing.assert_close(both[1], training_loss(model, alone)(alone["inputs"]))


def test_what_an_objective_cannot_attack_is_answered(scenes: str) -> None:
    two_stage = torch.nn.Module()
    two_stage.roi_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="single-stage detector"):
        score_logits(two_stage)
    softmax = build_model(
        {**RETINANET, "bbox_head": {**RETINANET["bbox_head"], "loss_cls": dict(type="mmdet.CrossEntropyLoss")}}
    )
    with pytest.raises(ValueError, match="sigmoid class scores"):
        detector_loss(softmax, {}, "vanishing")
    softmax.mask_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="trains on masks"):
        detector_loss(softmax, {}, "truth")
    model = build_model(CENTERNET)
    dataset = build_dataset(scenes, LOAD, GEOMETRY["crop"])
    with attacked(model, EvalAttack("fgsm"), 4.0, dataset), pytest.raises(ValueError, match="LoadAnnotations"):
        batch_of(model, dataset)
    with attacked(model, EvalAttack("autoattack"), 4.0, dataset), pytest.raises(ValueError, match="classifiers"):
        batch_of(model, dataset)


# ---- padding, slimming


def test_padding_and_canvas_are_not_attacked(scenes: str) -> None:
    model = build_model(CENTERNET)
    small = build_dataset(scenes, LOAD, dict(type="Resize", scale=(90, 90), keep_ratio=True), BOXES)
    canvas = build_dataset(
        scenes,
        {**LOAD, "to_float32": True},
        dict(
            type="RandomCenterCropPad",
            ratios=None,
            border=None,
            mean=[0, 0, 0],
            std=[1, 1, 1],
            to_rgb=True,
            test_mode=True,
            test_pad_mode=["logical_or", 63],
            crop_size=None,
        ),
    )
    for dataset, objective in ((small, "truth"), (canvas, "own")):
        clean = batch_of(model, dataset)
        with attacked(model, EvalAttack("pgd", steps=2, objective=objective), 4.0, dataset):  # type: ignore[arg-type]
            moved = batch_of(model, dataset)["inputs"]
        changed = (moved != clean["inputs"]).any(1)
        rows, columns = changed.any(2)[0].nonzero()[:, 0], changed.any(1)[0].nonzero()[:, 0]
        if dataset is small:  # 192x64 becomes 90x30, padded to 96x32
            assert clean["inputs"].shape[-2:] == (32, 96)
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 29, 0, 89)
        else:  # 192x64 in the middle of 255x127, padded to 256x128
            top, bottom, left, right = clean["data_samples"][0].border.astype(int)
            assert (bottom - top, right - left) == (64, 192)
            assert top > 0
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (top, bottom - 1, left, right - 1)


def test_masked_and_slimmed_detector_meet_the_same_attack(tmp_path: Path, scenes: str) -> None:
    masked = build_model(CENTERNET)
    mask_model(masked)
    randomize_masks(masked, 0.7, torch.Generator().manual_seed(0))
    freeze_masks(masked)
    small = slim(masked, blank_example(masked, (32, 128)))
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in masked.parameters())
    dataset = build_dataset(scenes, LOAD, GEOMETRY["crop"], BOXES)
    attack = EvalAttack("pgd", steps=3, alpha=2.0)
    shown, reports = [], []
    for name, model in (("masked", masked), ("slim", small)):
        with attacked(model, attack, 4.0, dataset):
            shown.append(batch_of(model, dataset)["inputs"])
        reports.append(evaluate(make_runner(tmp_path / name, model, scenes), attack, [4.0]))
    torch.testing.assert_close(shown[1], shown[0], rtol=0, atol=1e-4)
    assert reports[1].attacked[0] == pytest.approx(reports[0].attacked[0], abs=1e-3)
