"""A slimmed detector's boxes from mmdeploy's ONNX file, against mmdet's own on the same images.

    python benchmarks/mmdeploy_boxes.py CONFIG CHECKPOINT --name NAME --figure METRIC [--images N]

It wants mmdeploy beside the project, installed as ``docs/deployment.md`` says. The network goes through mmdeploy's
``torch2onnx`` with post-processing; its file and mmdet's ``predict`` then see the test set, one image at a time. Noted
are the metric of both, and the boxes of mmdet above a score of 0.05 that the file gives too: same label, and within the
image the same corners to a hundredth of a pixel. Both are noted once more where mmdet does not clip boxes to the image
before it suppresses some of them, as mmdeploy's rewritten heads do not. Rows go to
``benchmarks/results/deployment_boxes.json``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from measured import origin  # first: see there
from mmengine import Config

from mmitp.engine.config import load_config
from mmitp.engine.robust_eval import build_test_runner
from mmitp.engine.safe_load import load_data

RESULT = Path(__file__).resolve().parent / "results" / "deployment_boxes.json"
SCORE, SHIFT = 0.05, 0.01


def deploy_config(height: int, width: int) -> Config:
    """End to end for onnxruntime at one size; its thresholds count where the model's ``test_cfg`` has none."""
    thresholds = dict(score_threshold=0.05, confidence_threshold=0.005, iou_threshold=0.5)
    limits = dict(max_output_boxes_per_class=300, pre_top_k=5000, keep_top_k=100, background_label_id=-1)
    return Config(
        dict(
            onnx_config=dict(
                type="onnx",
                export_params=True,
                keep_initializers_as_inputs=False,
                opset_version=16,
                save_file="end2end.onnx",
                input_names=["input"],
                output_names=["dets", "labels"],
                input_shape=(width, height),
                optimize=True,
            ),
            codebase_config=dict(
                type="mmdet",
                task="ObjectDetection",
                model_type="end2end",
                post_processing={**thresholds, **limits},
            ),
            backend_config=dict(type="onnxruntime"),
        )
    )


def backend(cfg: Config, checkpoint: str, image: str, size: tuple[int, int]) -> Any:
    """mmdeploy's model around its ONNX file of the network."""
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    from mmdeploy.apis import torch2onnx
    from mmdeploy.apis.utils import build_task_processor

    deploy = deploy_config(*size)
    with tempfile.TemporaryDirectory() as folder:
        torch2onnx(image, folder, "end2end.onnx", deploy, copy.deepcopy(cfg), checkpoint, device="cpu")
        return build_task_processor(copy.deepcopy(cfg), deploy, "cpu").build_backend_model([f"{folder}/end2end.onnx"])


def found_again(theirs: Any, ours: Any, height: int, width: int) -> tuple[int, int]:
    """How many of ``ours`` above :data:`SCORE` are among ``theirs``, and how many there are."""
    ours = ours[ours.scores > SCORE]
    if not len(ours) or not len(theirs):
        return 0, len(ours)
    edge = torch.tensor([width, height, width, height])
    mine, its = (one.bboxes.clamp(min=0).minimum(edge) for one in (ours, theirs))
    shift = (mine[:, None] - its[None]).abs().amax(-1)
    shift = shift.masked_fill(ours.labels[:, None] != theirs.labels[None], torch.inf)
    return int((shift.amin(1) <= SHIFT).sum()), len(ours)


def measure(args: argparse.Namespace, work_dir: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    cfg = load_config(args.config, work_dir=work_dir)
    cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    runner = build_test_runner(copy.deepcopy(cfg), args.images)
    model, loop = runner.model.eval(), runner.test_loop
    weights = load_data(args.checkpoint, "cpu")
    model.load_state_dict(weights.get("state_dict", weights))
    first = next(iter(loop.dataloader))
    height, width = first["inputs"][0].shape[-2:]
    exported = backend(cfg, args.checkpoint, first["data_samples"][0].img_path, (height, width))

    def compared() -> tuple[list[float], list[int]]:
        """The metric of mmdet and of the file; of mmdet's boxes those that the file gives, and all."""
        evaluators = [copy.deepcopy(loop.evaluator) for _ in range(2)]
        again = [0, 0]
        with torch.no_grad():
            for data in loop.dataloader:
                both = [one.test_step(copy.deepcopy(data)) for one in (model, exported)]
                for evaluator, samples in zip(evaluators, both, strict=True):
                    evaluator.process(samples, data)
                for ours, theirs in zip(*both, strict=True):
                    found = found_again(theirs.pred_instances, ours.pred_instances, *ours.ori_shape)
                    again = [a + b for a, b in zip(again, found, strict=True)]
        return [e.evaluate(len(loop.dataloader.dataset))[args.figure] for e in evaluators], again

    figures, boxes = compared()
    row: dict[str, Any] = dict(size=f"{height}x{width}", images=len(loop.dataloader), figure=args.figure)
    row.update(mmdet=figures[0], file=figures[1], boxes=boxes)
    coder = getattr(model.bbox_head, "bbox_coder", None)
    if getattr(coder, "clip_border", False):
        coder.clip_border = False
        (row["unclipped"], _), row["unclipped_boxes"] = compared()
    return row


# -- the table


def percent(figure: float, name: str) -> float:
    """COCO's metrics are fractions."""
    return 100 * figure if name.startswith("coco/") else figure


def table(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    share = dict(decimals=2, suffix=" %")
    columns = [
        dict(title="slimmed network"),
        dict(title="input"),
        dict(title="images"),
        dict(title="AP of mmdet", decimals=2),
        dict(title="of mmdeploy's file", decimals=2),
        dict(title="boxes found again", **share),
        dict(title="AP of mmdet, boxes not clipped", decimals=2),
        dict(title="boxes found again then", **share),
    ]
    rows = []
    for name, row in measured.items():
        figures = [percent(row[key], row["figure"]) if key in row else None for key in ("mmdet", "file", "unclipped")]
        found = [100 * row[k][0] / row[k][1] if k in row else None for k in ("boxes", "unclipped_boxes")]
        rows.append([name, row["size"], row["images"], *figures[:2], found[0], figures[2], found[1]])
    return dict(columns=columns, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of the slimmed network (slim/config.py)")
    parser.add_argument("checkpoint", help="its weights")
    parser.add_argument("--name", required=True, help="the row's name")
    parser.add_argument("--figure", required=True, help="metric to compare, as coco/bbox_mAP")
    parser.add_argument("--images", type=int, help="so many of the test set, evenly spread; default: all")
    args = parser.parse_args()
    former = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    with tempfile.TemporaryDirectory() as work_dir:
        row = {**measure(args, work_dir), **about()}
    measured = {**former.get("measured", {}), args.name: row}
    RESULT.write_text(json.dumps({**table(measured), "measured": measured}, indent=1) + "\n", encoding="utf-8")


def about() -> dict[str, Any]:
    """Where a row comes from."""
    more = {name: importlib.metadata.version(name) for name in ("mmdeploy", "onnx", "onnxruntime")}
    about = origin()
    return {**about, "versions": {**about["versions"], **more}}


if __name__ == "__main__":
    main()
