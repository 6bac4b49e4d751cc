"""Robust evaluation of stock mmdet detectors, one- and two-stage, with COCO's metric on a data set of six images."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmitp  # noqa: F401  (makes the stack importable without compiled operators)

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from PIL import Image

from mmitp.engine.config import load_config
from mmitp.engine.detector_attack import detector_loss
from mmitp.engine.robust_eval import EvalAttack, attacked, build_test_runner, evaluate

IDS = [42, 7, 19, 3, 88, 56]
SMALL = [
    "model.backbone.init_cfg=None",
    "model.backbone.depth=18",
    "model.backbone.base_channels=8",
    "model.backbone.stem_channels=8",
    "model.neck.in_channels=8,16,32,64",
    "model.neck.out_channels=8",
    "test_dataloader.batch_size=2",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
    "test_dataloader.dataset.ann_file=boxes.json",
    "test_dataloader.dataset.data_prefix.img=",
    "test_dataloader.dataset.pipeline.1.scale=(120,72)",
    "log_level=WARNING",
]
STOCK = {
    "retinanet": (
        "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        [
            "model.bbox_head.in_channels=8",
            "model.bbox_head.feat_channels=8",
            "model.bbox_head.stacked_convs=1",
            "model.test_cfg.score_thr=0",
            "model.test_cfg.max_per_img=10",
        ],
    ),
    "faster_rcnn": (
        "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        [
            "model.rpn_head.in_channels=8",
            "model.rpn_head.feat_channels=8",
            "model.roi_head.bbox_roi_extractor.out_channels=8",
            "model.roi_head.bbox_head.in_channels=8",
            "model.roi_head.bbox_head.fc_out_channels=8",
            "model.train_cfg.rpn.sampler.num=32",
            "model.train_cfg.rpn_proposal.max_per_img=20",
            "model.train_cfg.rcnn.sampler.num=16",
            "model.test_cfg.rpn.max_per_img=20",
            "model.test_cfg.rcnn.score_thr=0",
            "model.test_cfg.rcnn.max_per_img=10",
        ],
    ),
}
KEYS = ("bboxes", "labels", "scores")
OBJECTIVES = ["truth", "own", "vanishing", "fabrication"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two boxes an image, a person and a bicycle; none in the fifth, and a crowd for the third's second."""
    root = tmp_path_factory.mktemp("coco")
    draw = np.random.default_rng(0)
    images, boxes = [], []
    for position, identity in enumerate(IDS):
        width, height = [(96, 64), (64, 96), (80, 80)][position % 3]
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{identity}.png")
        images.append(dict(id=identity, file_name=f"{identity}.png", width=width, height=height))
        for category in (1, 2) if position != 4 else ():
            box = [8 * category, 4 + position, 20 + category, 24]
            crowd = int(position == 2 and category == 2)
            boxes.append(
                dict(id=len(boxes) + 1, image_id=identity, category_id=category, bbox=box, area=480, iscrowd=crowd)
            )
    names = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO["classes"], 1)]
    write(root / "boxes.json", images, boxes, names)
    some = [IDS[0], IDS[2], IDS[4]]
    write(
        root / "some.json",
        [image for image in images if image["id"] in some],
        [box for box in boxes if box["image_id"] in some],
        names,
    )
    return root


def write(path: Path, images: list, boxes: list, names: list) -> None:
    path.write_text(json.dumps(dict(images=images, annotations=boxes, categories=names)))


def stock(coco: Path, tmp_path: Path, name: str = "retinanet") -> Config:
    source, options = STOCK[name]
    places = [f"test_dataloader.dataset.data_root={coco}/", f"test_evaluator.ann_file={coco}/boxes.json"]
    cfg = load_config(source, [*SMALL, *options, *places], str(tmp_path))
    cfg.experiment_name = "_".join(tmp_path.parts[-3:])
    cfg.randomness = dict(seed=0)
    return cfg


@MODELS.register_module()
class FindsEverySecond(BaseModel):
    """Finds all objects of the images at even positions, with one box more that is none, and nothing elsewhere."""

    def __init__(self, found: tuple[int, ...] = (42, 19, 88), spurious: bool = True, **_: Any) -> None:
        super().__init__(dict(type="mmdet.DetDataPreprocessor", pad_size_divisor=32))
        self.found, self.spurious = found, spurious

    def forward(self, inputs: torch.Tensor, data_samples: list, mode: str) -> list:
        for sample in data_samples:
            truth, ignored = sample.gt_instances, sample.ignored_instances
            boxes = torch.cat([truth.bboxes, ignored.bboxes, torch.tensor([[0.0, 40.0, 9.0, 49.0]])])
            labels = torch.cat([truth.labels, ignored.labels, torch.tensor([0])])
            scores = torch.full((len(boxes),), 0.9)
            scores[-1] = 0.1
            kept = torch.full((len(boxes),), sample.img_id in self.found)
            kept[-1] &= self.spurious
            sample.pred_instances = InstanceData(bboxes=boxes, labels=labels, scores=scores)[kept]
        return data_samples


@METRICS.register_module()
class KeptForCoco(BaseMetric):
    """Keeps what a metric is given to read, test by test: ground truth and detections."""

    tests: list[list] = []  # noqa: RUF012

    def process(self, data_batch: Any, data_samples: list) -> None:
        for sample in data_samples:
            truth = [sample[name][key] for name in ("gt_instances", "ignored_instances") for key in KEYS[:2]]
            found = [sample["pred_instances"][key] for key in KEYS]
            self.results.append(copy.deepcopy((sample["img_id"], truth, found)))

    def compute_metrics(self, results: list) -> dict:
        KeptForCoco.tests.append(results)
        return {"detections": sum(len(found[0]) for _, _, found in results)}


def random_runner(cfg: Config, max_images: int | None = None) -> Runner:
    """Random weights with BatchNorm statistics of their own."""
    cfg.test_evaluator = [cfg.test_evaluator, dict(type="KeptForCoco", prefix="kept")]
    runner = build_test_runner(cfg, max_images)
    runner.model.init_weights()
    for module in runner.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
    runner.model.eval()
    return runner


def batch_of(runner: Runner) -> dict:
    return runner.model.data_preprocessor(next(iter(runner.test_dataloader)), False)


@contextmanager
def all_proposals(model: Any) -> Iterator[None]:
    """A two-stage detector's loss without the noise of sampling."""
    samplers = [model.rpn_head.sampler, model.roi_head.bbox_sampler] if hasattr(model, "roi_head") else []
    numbers = [sampler.num for sampler in samplers]
    for sampler in samplers:
        sampler.num = 10**6
    yield
    for sampler, number in zip(samplers, numbers, strict=True):
        sampler.num = number


def equal(one: list, other: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_subset_is_measured_like_an_annotation_file_of_its_images(coco: Path, tmp_path: Path) -> None:
    """Of persons 2/5 are found, which reaches 41 of COCO's 101 recalls; of bicycles 1/4, the crowd apart: 26."""

    def figures(max_images: int | None, ann_file: str = "boxes.json") -> dict:
        cfg = stock(coco, tmp_path)
        cfg.model = dict(type="FindsEverySecond")
        cfg.test_dataloader.dataset.ann_file = ann_file
        cfg.test_evaluator.ann_file = str(coco / ann_file)
        return build_test_runner(cfg, max_images).test()

    whole, subset = figures(None), figures(3)
    assert whole["coco/bbox_mAP"] == round((41 + 26) / 202, 3)
    assert subset["coco/bbox_mAP"] == 1.0
    assert subset == figures(None, "some.json")


def test_metrics_with_another_annotation_file_take_no_subset(coco: Path, tmp_path: Path) -> None:
    cfg = stock(coco, tmp_path)
    cfg.model = dict(type="FindsEverySecond")
    cfg.test_evaluator = dict(type="CrowdHumanMetric", ann_file="people.odgt")
    with pytest.raises(ValueError, match="CrowdHumanMetric would count the objects of all images"):
        build_test_runner(cfg, 3)


@pytest.mark.parametrize("name", sorted(STOCK))
def test_every_objective_is_raised_repeatably_and_leaves_the_metric_its_ground_truth(
    coco: Path, tmp_path: Path, name: str
) -> None:
    runner = random_runner(stock(coco, tmp_path, name), max_images=4)
    dataset, raw = runner.test_dataloader.dataset, next(iter(runner.test_dataloader))

    def prepare() -> dict:
        return runner.model.data_preprocessor(copy.deepcopy(raw), False)

    data = prepare()
    for objective in OBJECTIVES:
        attack = EvalAttack("pgd", steps=3, objective=objective, score_thr=0.0)  # type: ignore[arg-type]
        KeptForCoco.tests.clear()
        report = evaluate(runner, attack, [0.0, 16.0])
        assert (report.images, report.total) == (4, 6)
        assert report.attacked[0] == report.clean
        assert report.attacked[1].keys() == report.clean.keys() >= {"coco/bbox_mAP", "kept/detections"}
        assert report.largest == pytest.approx([0.0, 16.0], abs=1e-3)
        assert len(KeptForCoco.tests) == 3
        for clean, still, hit in zip(*KeptForCoco.tests, strict=True):
            assert len(clean[2][0]) > 0
            assert clean[0] == hit[0]
            assert equal(clean[1], hit[1])
            assert equal(clean[2], still[2])
            assert not equal(clean[2], hit[2])
        assert [identity for identity, _, _ in KeptForCoco.tests[0]] == [42, 7, 3, 88]

        # Two-stage detectors sample proposals: by the attack's seed, whatever the global state, which stays as it is.
        shown = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            with attacked(runner.model, attack, 16.0, dataset):
                shown.append(prepare()["inputs"])
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(*shown)
        if name == "faster_rcnn" and objective in ("truth", "own"):
            continue  # an untrained network's proposals jump onto and off the boxes, which no gradient sees
        loss = detector_loss(runner.model, data, objective, original=True, score_thr=0.0)  # type: ignore[arg-type]
        values = []
        for inputs in (data["inputs"], shown[0]):
            with torch.no_grad(), all_proposals(runner.model):
                values.append(loss(inputs).sum())
        assert values[1] > values[0]


def test_a_two_stage_detectors_objects_vanish_and_appear(coco: Path, tmp_path: Path) -> None:
    runner = random_runner(stock(coco, tmp_path, "faster_rcnn"))
    runner.model.roi_head.bbox_head.fc_cls.weight.data.mul_(20)
    raw, scores = next(iter(runner.test_dataloader)), []
    for objective in ("vanishing", "fabrication"):
        # Several restarts: a loss for each image.
        attack = EvalAttack("pgd", steps=3, restarts=2, objective=objective)  # type: ignore[arg-type]
        with attacked(runner.model, attack, 16.0):
            data = runner.model.data_preprocessor(copy.deepcopy(raw), False)
        with torch.no_grad():
            found = runner.model.predict(data["inputs"], data["data_samples"])
        scores.append(sum(sample.pred_instances.scores.sum().item() for sample in found))
    assert scores[0] < 0.9 * scores[1]


def test_a_detector_that_finds_nothing_more_has_an_ap_of_0(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmdet's COCO metric then gives no figure at all; -1 stays its word for sizes that no object has."""
    cfg = stock(coco, tmp_path)
    cfg.model = dict(type="FindsEverySecond")
    runner = build_test_runner(cfg)
    clean, run = runner.test(), runner.test_loop.run

    def blinded() -> dict:
        runner.model.found = ()
        return run()

    monkeypatch.setattr("mmitp.engine.detector_attack.detector_loss", lambda *_, **__: lambda x: x.sum((1, 2, 3)))
    monkeypatch.setattr(runner, "test", lambda: clean)
    monkeypatch.setattr(runner.test_loop, "run", blinded)
    report = evaluate(runner, EvalAttack("fgsm", objective="own"), [1.0, 2.0])
    assert report.clean["coco/bbox_mAP"] == round((41 + 26) / 202, 3)
    for metrics in report.attacked:
        assert metrics["coco/bbox_mAP"] == metrics["coco/bbox_mAP_50"] == 0.0
        assert metrics["coco/bbox_mAP_l"] == report.clean["coco/bbox_mAP_l"] == -1.0
    assert report.save(tmp_path / "out.json") == [f"wrote {tmp_path / 'out.json'}", f"wrote {tmp_path / 'out.png'}"]

    monkeypatch.setattr(runner, "test", dict)
    empty = evaluate(runner, EvalAttack("fgsm", objective="own"), [1.0, 2.0])
    assert "nothing was detected" in empty.table()
    assert empty.save(tmp_path / "empty.json") == [f"wrote {tmp_path / 'empty.json'}"]


def test_a_detector_without_a_training_loss_in_eval_mode_is_named(coco: Path, tmp_path: Path) -> None:
    runner = random_runner(stock(coco, tmp_path))
    data = batch_of(runner)

    def loss(inputs: torch.Tensor, data_samples: list) -> dict:
        raise TypeError("missing 1 required positional argument: 'dn_meta'")

    runner.model.loss = loss
    with pytest.raises(ValueError, match=r"RetinaNet does not give its training loss in eval mode .*dn_meta"):
        detector_loss(runner.model, data, "truth")(data["inputs"])
