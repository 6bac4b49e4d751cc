"""In-train pruning of an Ultralytics YOLO through its own trainer's callbacks, on a data set in COCO format.

    pip install ultralytics                     # AGPL-3.0: an example's dependency, never one of mmitp
    python examples/ultralytics_yolo.py DATA    # DATA/annotations/{train,val}.json, DATA/images/

YOLO11n is built from its yaml with random weights. Masks train in the window (from 1/15 to 1/3 of the epochs), then
what they drop is cut out of the live network, its average and its optimizer, and the rest of the run trains the small
network. ``--dense`` trains the same without masks, for comparison. The lines that prune are marked ``# prune``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionTrainer

from mmitp.pruning import InTrainPruner, mask_model, masked_layers
from mmitp.pruning.check import counted_macs
from mmitp.pruning.live import plan_live, shrink_live


def to_yolo(data: Path, out: Path) -> Path:
    """Writes images and labels (class, centre and size as parts of the image) in YOLO's layout; returns its yaml."""
    names: dict[int, str] = {}
    for split in ("train", "val"):
        coco = json.loads((data / f"annotations/{split}.json").read_text(encoding="utf-8"))
        number = {category["id"]: i for i, category in enumerate(coco["categories"])}
        names = {number[category["id"]]: category["name"] for category in coco["categories"]}
        for folder in ("images", "labels"):
            (out / folder / split).mkdir(parents=True, exist_ok=True)
        lines: dict[int, list[str]] = {image["id"]: [] for image in coco["images"]}
        size = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
        for box in coco["annotations"]:
            (x, y, w, h), (width, height) = box["bbox"], size[box["image_id"]]
            place = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines[box["image_id"]].append(" ".join(map(str, (number[box["category_id"]], *place))))
        for image in coco["images"]:
            shutil.copy(data / "images" / image["file_name"], out / "images" / split / image["file_name"])
            label = (out / "labels" / split / image["file_name"]).with_suffix(".txt")
            label.write_text("\n".join(lines[image["id"]]) + "\n", encoding="utf-8")
    config = out / "data.yaml"
    text = dict(path=str(out.resolve()), train="images/train", val="images/val", names=names)
    config.write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    return config


@contextmanager
def boxes_alone(model: Any) -> Iterator[None]:
    """The detector for a while as it is deployed: its output are the boxes, and not the features they come from."""
    head = model.model[-1]
    head.export, before = True, head.export
    try:
        yield
    finally:
        head.export = before


class Pruning:
    """What pruning adds to a run: five callbacks.

    Args:
        target: part of the operations to keep.
        begin, end: the window, in epochs.
        example: one image of the size that operations are stated for.
    """

    def __init__(self, target: float, begin: int, end: int, example: Tensor) -> None:
        self.target, self.begin, self.end, self.example = target, begin, end, example
        self.loss: Tensor | None = None
        self.gap = 0.0

    def register(self, trainer: DetectionTrainer) -> None:
        for event in ("on_pretrain_routine_end", "on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end"):
            trainer.add_callback(event, getattr(self, event))

    def on_pretrain_routine_end(self, trainer: DetectionTrainer) -> None:
        """The optimizer is there: masks go to its group without decay, and the pruner follows its steps."""
        model, groups = trainer.model, trainer.optimizer.param_groups
        masks = {id(layer.prune_mask): layer.prune_mask for layer in masked_layers(model).values()}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in masks]
        next(g for g in groups if g["weight_decay"] == 0)["params"] += masks.values()
        steps = (self.end - self.begin) * len(trainer.train_loader)
        with boxes_alone(model):
            self.pruner = InTrainPruner(model, self.example, self.target, steps=steps)
        self.pruner.attach(trainer.optimizer)
        model.register_forward_hook(self.keep_loss)

    def keep_loss(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training and isinstance(args[0], dict):
            self.loss = output[0]

    def on_train_epoch_start(self, trainer: DetectionTrainer) -> None:
        self.pruner.active = self.begin <= trainer.epoch < self.end

    def on_train_batch_end(self, trainer: DetectionTrainer) -> None:
        """The trainer keeps its last loss, and with it the graph of a network that is about to change."""
        if self.loss is not None:
            trainer.loss, self.loss = trainer.loss.detach(), self.loss.detach_()

    def on_train_epoch_end(self, trainer: DetectionTrainer) -> None:
        model, average = trainer.model, trainer.ema.ema
        if trainer.epoch + 1 == self.end:
            self.report = self.pruner.freeze()
        # The average prunes what the trained network prunes: averages of masks would drift apart.
        for layer, source in zip(masked_layers(average).values(), masked_layers(model).values(), strict=True):
            layer.prune_mask.data.copy_(source.prune_mask.data)
            layer.set_pattern(source.prune_pattern)
        if trainer.epoch + 1 == self.end:
            with boxes_alone(model), boxes_alone(average):
                before = average(self.example)
                plan = plan_live(model, self.example, self.pruner.budget, self.pruner.more_examples)
                shrink_live(model, plan, trainer.optimizer)
                shrink_live(average, plan)
                self.gap = float((average(self.example) - before).abs().max() / before.abs().max())
            self.pruner.detach()
            trainer.ema._pairs = None  # it keeps lists of tensors of the old sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder in COCO format")
    parser.add_argument("--model", default="yolo11n.yaml")
    parser.add_argument("--target", type=float, default=0.5, help="part of the operations to keep")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.0014)
    parser.add_argument("--dense", action="store_true", help="train without masks")
    parser.add_argument("--out", type=Path, default=Path("runs/mmitp"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    settings = dict(
        model=args.model,
        data=str(to_yolo(args.data, args.out / "data")),
        epochs=args.epochs,
        imgsz=args.imgsz,
        batch=args.batch,
        nbs=args.batch,  # an optimizer step a batch, so that the window's steps are known
        optimizer="AdamW",  # it steps elementwise; MuSGD looks at whole matrices, which slimming narrows
        lr0=args.lr,
        pretrained=False,
        amp=False,
        val=False,  # after the last epoch alone
        plots=False,
        save=False,
        workers=0,
        device=args.device,
        project=str(args.out.resolve()),
        name="dense" if args.dense else "pruned",
        exist_ok=True,
    )
    trainer = DetectionTrainer(overrides=settings)
    trainer.final_eval = lambda: None  # it would fuse BatchNorms into convolutions, which then compute fewer channels
    trainer.model = trainer.get_model(cfg=args.model, verbose=False).to(trainer.device)
    example = torch.rand(1, 3, args.imgsz, args.imgsz, generator=torch.Generator().manual_seed(0)).to(trainer.device)
    with boxes_alone(trainer.model):
        macs = counted_macs(trainer.model, example)
    pruning = Pruning(args.target, max(args.epochs // 15, 1), max(args.epochs // 3, 2), example)
    if not args.dense:
        with boxes_alone(trainer.model):
            mask_model(trainer.model, example_inputs=example)  # prune: before the optimizer is made
        pruning.register(trainer)  # prune
    trainer.train()

    network = trainer.ema.ema.eval()
    parameters = sum(p.numel() for p in network.parameters())
    network.model[-1].export = True
    figures = dict(
        mAP50_95=trainer.metrics["metrics/mAP50-95(B)"],
        mAP50=trainer.metrics["metrics/mAP50(B)"],
        macs_dense=macs,
        macs=counted_macs(network, example),
        parameters=parameters,
    )
    if not args.dense:
        report = pruning.report
        figures.update(target=args.target, ratio=report.ratio, macs_of_budget=report.macs_kept, gap=pruning.gap)
    out = args.out / f"{settings['name']}.pt2"
    torch.export.save(torch.export.export(network, (example,)), out)
    loaded = torch.export.load(out).module()(example)
    figures.update(exported_gap=float((loaded - network(example)).abs().max() / loaded.abs().max()))
    (args.out / f"{settings['name']}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
