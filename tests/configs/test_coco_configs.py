"""configs/coco and configs/bccd on eight small photos: train, prune, slim, test under attack, export."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from PIL import Image

import mmitp  # noqa: F401  before mmdet, where compiled operators are missing

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from mmdet.datasets import CocoDataset

from mmitp.engine.config import load_config
from mmitp.engine.export import export_checkpoint
from mmitp.engine.robust_eval import EvalAttack, build_test_runner, evaluate
from mmitp.engine.run import build_runner
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.pruning import masked_layers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RESNET = [
    "model.backbone.init_cfg=None",
    "model.backbone.depth=18",
    "model.backbone.base_channels=8",
    "model.backbone.stem_channels=8",
    "model.neck.in_channels=8,16,32,64",
    "model.neck.out_channels=32",
]
ROI = "model.roi_head.bbox_head"
SMALL = {
    "coco/retinanet_r50_fpn_prune50_8xb2-1x_coco": [
        *RESNET, "model.bbox_head.in_channels=32", "model.bbox_head.feat_channels=32",
        "model.bbox_head.stacked_convs=1", "model.test_cfg.score_thr=0.0", "model.test_cfg.max_per_img=10",
        "model.test_cfg.nms_pre=20",
    ],
    "coco/faster-rcnn_r50_fpn_prune50_8xb2-1x_coco": [
        *RESNET, "model.rpn_head.in_channels=32", "model.rpn_head.feat_channels=32", f"{ROI}.in_channels=32",
        f"{ROI}.fc_out_channels=8", f"{ROI}.roi_feat_size=2", "model.roi_head.bbox_roi_extractor.out_channels=32",
        "model.roi_head.bbox_roi_extractor.roi_layer.output_size=2", "model.train_cfg.rpn_proposal.max_per_img=20",
        "model.test_cfg.rpn.max_per_img=20", "model.test_cfg.rcnn.score_thr=0.0", "model.test_cfg.rcnn.max_per_img=10",
    ],
    "coco/rtmdet_tiny_prune50_8xb32-300e_coco": [
        "model.backbone.widen_factor=0.125", "model.neck.in_channels=32,64,128", "model.neck.out_channels=32",
        "model.bbox_head.in_channels=32", "model.bbox_head.feat_channels=32", "model.backbone.norm_cfg.type=BN",
        "model.neck.norm_cfg.type=BN", "model.bbox_head.norm_cfg.type=BN", "model.backbone.init_cfg=None",
        "model.test_cfg.max_per_img=10", "model.test_cfg.nms_pre=20",
    ],
    "coco/yolox_s_prune50_8xb8-300e_coco": [
        "model.backbone.widen_factor=0.125", "model.neck.in_channels=32,64,128", "model.neck.out_channels=32",
        "model.bbox_head.in_channels=32", "model.bbox_head.feat_channels=32",
        "model.data_preprocessor.batch_augments.0.random_size_range=(64,96)", "model.test_cfg.score_thr=0.0",
    ],
    "bccd/rtmdet_tiny_bccd_prune50": [
        "model.backbone.widen_factor=0.125", "model.neck.in_channels=32,64,128", "model.neck.out_channels=32",
        "model.bbox_head.in_channels=32", "model.bbox_head.feat_channels=32", "model.test_cfg.max_per_img=10",
        "model.test_cfg.nms_pre=20",
    ],
}  # fmt: skip
SHAPE = (64, 96)  # of the network's input, where the config resizes to one size


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photos of noise with a dark and a bright box each."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for i in range(8):
        pixels = draw.integers(80, 160, (64, 96, 3), dtype=np.uint8)
        for category, value in ((1, 0), (2, 255)):
            x, y = 48 * (category - 1) + 4 + i, 8 + 2 * i
            pixels[y : y + 30, x : x + 32] = value
            box = dict(bbox=[x, y, 32, 30], area=960, iscrowd=0, category_id=category, image_id=i)
            boxes.append(dict(box, id=len(boxes) + 1))
        Image.fromarray(pixels).save(root / f"{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", width=96, height=64))
    for name, classes in (("coco", CocoDataset.METAINFO["classes"]), ("bccd", ("RBC", "WBC", "Platelets"))):
        categories = [dict(id=i, name=title) for i, title in enumerate(classes, 1)]
        content = dict(images=images, annotations=boxes, categories=categories)
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def shrink(node: Any) -> None:
    """Sizes in pipelines, made for photos of some hundred pixels, as parts of the test's."""
    for transform in node if isinstance(node, list) else [node]:
        if isinstance(transform, dict):
            for key, value in transform.items():
                if isinstance(value, dict | list):
                    shrink(value)
                elif key in ("scale", "img_scale", "size", "crop_size", "border"):
                    signs = [-1 if side < 0 else 1 for side in value]
                    large = max(map(abs, value)) > 640  # what mosaic gives is cut down again
                    transform[key] = tuple(s * n * (2 if large else 1) for s, n in zip(signs, SHAPE[::-1], strict=True))


def small(name: str, photos: Path, folder: Path) -> ConfigDict:
    """A config for three epochs of two steps of four photos; the masks train in the second."""
    cfg = load_config(str(CONFIGS / f"{name}.py"), SMALL[name], str(folder))
    annotations = f"{name.split('/')[0]}.json"
    for part in ("train", "val", "test"):
        loader = cfg[f"{part}_dataloader"]
        loader.update(batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False)
        shrink(loader.dataset.get("pipeline"))
        inner = loader.dataset.get("dataset", loader.dataset)
        inner.update(data_root=f"{photos}/", ann_file=annotations, data_prefix=dict(img=""))
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(photos / annotations)
    cfg.train_cfg.update(max_epochs=3, val_interval=4, dynamic_intervals=None)
    cfg.param_scheduler = []
    cfg.log_level = "WARNING"
    cfg.default_hooks.checkpoint.interval = 3
    for hook in cfg.custom_hooks:
        if hook.type == "mmitp.PruneHook":
            hook.update(begin=1, end=2, input_shape=SHAPE)
        elif hook.type == "PipelineSwitchHook":
            hook.switch_epoch = 2
            shrink(hook.switch_pipeline)
        elif hook.type == "YOLOXModeSwitchHook":
            hook.num_last_epochs = 1
    return cfg


@pytest.mark.parametrize("name", SMALL)
def test_the_config_trains_prunes_slims_and_is_tested_under_attack(name: str, photos: Path, tmp_path: Path) -> None:
    cfg = small(name, photos, tmp_path)
    runner = build_runner(cfg)
    runner.train()
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    pruning = json.loads((tmp_path / "pruning.json").read_text())
    assert pruning["ratio"] <= 0.5
    assert not masked_layers(runner.model)  # the last epoch trained the slimmed network

    slimmed = slim_checkpoint(small(name, photos, tmp_path), str(tmp_path / "epoch_3.pth"), str(tmp_path / "slim"))
    assert slimmed.macs_slim == pruning["macs_kept"]
    assert slimmed.params_slim == sum(p.numel() for p in runner.model.parameters()) < slimmed.params_dense
    test = load_config(slimmed.config, work_dir=str(tmp_path / "test"))
    test.load_from, test.experiment_name = slimmed.weights, f"{cfg.work_dir}_test"
    report = evaluate(build_test_runner(test), EvalAttack(name="pgd", steps=1), [2.0])
    assert report.images == 8
    assert 0 < report.largest[0] <= 2.001
    assert all(set(metrics) == set(report.clean) for metrics in report.attacked)
    assert 0 <= report.clean["coco/bbox_mAP_50"] <= 1

    exporting = (load_config(slimmed.config), slimmed.weights, str(tmp_path / "slim.onnx"))
    if "faster" in name:
        with pytest.raises(ValueError, match="two-stage detectors cannot be exported"):
            export_checkpoint(*exporting)
    else:
        assert export_checkpoint(*exporting).difference < 1e-4


def scopeless(node: Any) -> Any:
    """Without the scope that mmengine notes where a base comes from another package."""
    if isinstance(node, dict):
        return {key: scopeless(value) for key, value in node.items() if key != "_scope_"}
    return [scopeless(value) for value in node] if isinstance(node, list | tuple) else node


def test_the_pruned_configs_differ_from_mmdets_by_the_pruning_alone() -> None:
    stock = {
        "coco/retinanet_r50_fpn_prune50_8xb2-1x_coco": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        "coco/faster-rcnn_r50_fpn_prune50_8xb2-1x_coco": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "coco/rtmdet_tiny_prune50_8xb32-300e_coco": "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
        "coco/yolox_s_prune50_8xb8-300e_coco": "mmdet::yolox/yolox_s_8xb8-300e_coco.py",
        "bccd/rtmdet_tiny_bccd_prune50": str(CONFIGS / "bccd/rtmdet_tiny_bccd.py"),
    }
    assert stock.keys() == SMALL.keys()
    recipe = load_config(str(CONFIGS / "_base_/pruning/early.py")).custom_hooks[0]
    for name, source in stock.items():
        ours, theirs = load_config(str(CONFIGS / f"{name}.py")), load_config(source)
        *hooks, pruning = ours.custom_hooks
        if "bccd" in name:  # as many epochs as take the dense run's processor time
            theirs.custom_hooks[1].switch_epoch = ours.train_cfg.max_epochs * 9 // 10
            theirs.max_epochs, theirs.switch = ours.max_epochs, theirs.custom_hooks[1]
        assert scopeless(hooks) == scopeless(theirs.get("custom_hooks", []))
        assert {k: v for k, v in scopeless(pruning).items() if k != "input_shape"} == dict(recipe)
        assert scopeless(ours.model) == scopeless(dict(theirs.model, type="mmitp.MaskedModel", of=theirs.model.type))
        assert ours.optim_wrapper.paramwise_cfg.pop("custom_keys") == {"prune_mask": {"decay_mult": 0.0}}
        theirs.optim_wrapper.setdefault("paramwise_cfg", {})
        for key in theirs:
            if key not in ("custom_hooks", "model", "work_dir", "train_cfg", "param_scheduler", "custom_imports"):
                assert scopeless(ours[key]) == scopeless(theirs[key]), (name, key)
