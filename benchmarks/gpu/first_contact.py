"""The first minutes on a card: does everything run there, and is it right?

    python benchmarks/gpu/first_contact.py [--minutes 3] [--parts tests resnet20 ...]

Parts: ``tests``, all tests marked ``cuda`` (tests/cuda: kernels and paths against the CPU, in three precisions);
``resnet20`` and ``centernet``, short runs of the real configs by mmengine's Runner with AMP, attacked, pruned and
slimmed on the way, with their steps a second and peak memory; ``retinanet`` and ``faster_rcnn``, two attacked and
pruned steps of stock detectors and one prediction.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import evidence  # first: makes the other scripts importable
from evidence import ROOT, Bench, Part

MINUTES = 3.0
#: Tests that a dry run on the CPU leaves out: they train, and each is there in another form.
LONG = "captured or hooks or guard or centernet"


def tests(bench: Bench) -> None:
    """Results by test, written down as they come."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "tests/cuda",
        "-v",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    if bench.dry:
        command += ["-k", f"not ({LONG})"]
    environment = dict(os.environ, MMITP_CUDA_TESTS_ON=bench.device)
    counts: dict[str, int] = {}
    failed: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", line):
                counts[found[2]] = counts.get(found[2], 0) + 1
                failed += [found[1]] if found[2] in ("FAILED", "ERROR") else []
                bench.note(counts=counts, failed=failed)
    if process.returncode or not counts.get("PASSED"):
        raise RuntimeError(f"pytest ended with {process.returncode}, {counts}: {', '.join(failed) or 'see the log'}")


def resnet20(bench: Bench) -> None:
    """FastAT and pruning to 0.5 of ResNet-20, with every phase tried and resumed first."""
    from toys import cifar10

    from mmitp.engine.config import load_config
    from mmitp.engine.dry_run import dry_run

    root, real = cifar10(bench.out, bench.dry)
    cfg = load_config(str(ROOT / "configs/cifar10/resnet20_cifar10_fastat_psi50.py"))
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = root
    if bench.dry:
        cfg.model.backbone.depth = 8
        cfg.train_dataloader.batch_size = 8
    amp(cfg, bench.device)
    bench.note(data="CIFAR-10" if real else "noise", phases=dry_run(cfg).splitlines())
    short_run(bench, cfg, batches=2 if bench.dry else 40)


def centernet(bench: Bench) -> None:
    """FastAT and pruning to 0.5 of CenterNet-DLA34 at 384x1280, batch 16."""
    from mmitp.datasets.scenes import write_scenes
    from mmitp.engine.config import load_config

    name = "kitti/centernet_dla34_kitti_prune50_robust"
    options: list[str] = []
    if bench.dry:
        name, options = "demo/centernet_scenes_prune50_robust", ["model.backbone.width=0.125"]
    cfg = load_config(str(ROOT / f"configs/{name}.py"), options)
    if bench.dry:
        narrow(cfg)
    frames, size = (4, (192, 64)) if bench.dry else (88, (621, 188))  # 4 batches of 16; enlarged to the config's size
    data = str(write_scenes(bench.out / f"scenes{frames}", frames, seed=1, size=size, val_fraction=0.25)) + "/"
    for split in ("train", "val", "test"):
        loader = cfg[f"{split}_dataloader"]
        loader.dataset.data_root = data
        cfg.get(f"{split}_evaluator", {}).update(data_root=data)
        if bench.dry:
            loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    amp(cfg, bench.device)
    short_run(bench, cfg, batches=1 if bench.dry else 4)


def narrow(cfg: Any) -> None:
    """CenterNet-DLA34 at an eighth of its width, on images of 64x192."""
    cfg.model.backbone.update(width=0.125, init_cfg=None)
    cfg.model.neck.in_channels = (8, 16, 32, 64)
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8)
    for split in ("train", "val", "test"):
        for transform in cfg[f"{split}_dataloader"].dataset.pipeline:
            if transform.type == "mmitp.ScaleShiftCrop":
                transform.size = (192, 64)
    for hook in cfg.get("custom_hooks") or []:
        if hook.type == "mmitp.PruneHook":
            hook.input_shape = (64, 192)


def amp(cfg: Any, device: str) -> None:
    """As ``tools/train.py --amp``; mmengine has none on the CPU."""
    if device == "cuda":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")


def short_run(bench: Bench, cfg: Any, batches: int) -> None:
    """Three epochs of a config: before the window, in it, and with the small network; then a validation."""
    from mmengine.hooks import Hook

    from mmitp.engine.run import build_runner

    class Clock(Hook):
        """Seconds of every iteration, once the device is done with it."""

        priority = "LOWEST"

        def __init__(self) -> None:
            self.times: dict[int, list[float]] = {}
            self.losses: list[float] = []
            self.figures: list[str] = []

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            evidence.synchronize(bench.device)
            self.since = time.perf_counter()

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            evidence.synchronize(bench.device)
            self.times.setdefault(runner.epoch, []).append(time.perf_counter() - self.since)
            self.losses.append(float(outputs["loss"]))

        def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
            self.figures += list(metrics or {})

    cfg = copy.deepcopy(cfg)
    cfg.work_dir, cfg.log_level = str(bench.out / f"work_{bench.name}"), "WARNING"
    cfg.experiment_name = f"first_contact_{bench.name}_{time.time_ns()}"
    cfg.train_cfg.update(max_epochs=3, val_interval=3)
    cfg.train_cfg.pop("dynamic_intervals", None)
    cfg.train_dataloader.num_batch_per_epoch = batches
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=3, max_keep_ckpts=1)
    for hook in cfg.custom_hooks:
        if hook.type == "mmitp.PruneHook":
            hook.update(begin=1, end=2, slim_at_end=True)
    runner, clock = build_runner(cfg), Clock()
    runner.register_hook(clock)
    runner.train()
    if not all(loss < float("inf") for loss in clock.losses):
        raise RuntimeError(f"losses that are not finite: {clock.losses}")
    hook = next(h for h in runner.hooks if type(h).__name__ == "PruneHook")
    names = ("before the window", "in the window", "slimmed")
    bench.note(
        batch=int(cfg.train_dataloader.batch_size),
        steps_per_second={n: round(1 / statistics.median(clock.times[i]), 2) for i, n in enumerate(names)},
        losses=[round(clock.losses[0], 4), round(clock.losses[-1], 4)],
        ops_kept=hook.slimmed["ratio"],
        validated=len(clock.figures),
        peak_gib=evidence.peak_memory(bench.device),
    )


def detector(bench: Bench, config: str, compares: bool) -> None:
    """Two steps of a stock detector under attack with masks, its first loss against the CPU's, and a prediction."""
    import torch
    from fastat_cost import step
    from mmengine import MessageHub

    from mmitp.engine.attack import select_losses
    from mmitp.engine.config import load_config
    from mmitp.engine.example import blank_example
    from mmitp.engine.hooks import AdversarialHook
    from mmitp.models.report import SmallSteps, build_masked, random_batch
    from mmitp.pruning import InTrainPruner

    shape = (64, 64) if bench.dry else (256, 256)
    cfg = load_config(config)
    if bench.dry:
        shrink(cfg)
    first: Any = build_masked(cfg, linear=True).train()
    raw = random_batch(first, shape, 2, torch.Generator().manual_seed(0))
    losses = []
    for place in ("cpu", bench.device):
        twin = copy.deepcopy(first).to(place)
        with torch.no_grad():
            data = twin.data_preprocessor(copy.deepcopy(raw), True)
            losses.append(float(select_losses(twin(**data, mode="loss"), None)))
    bench.note(losses=losses)
    if compares and abs(losses[0] - losses[1]) > 1e-2 * abs(losses[0]):
        raise RuntimeError(f"the loss on the device is {losses[1]}, on the CPU {losses[0]}")
    optimizer = SmallSteps([p for p in twin.parameters() if p.requires_grad])
    pruner = InTrainPruner(twin, blank_example(twin, shape), 0.5, steps=2)
    pruner.attach(optimizer)
    pruner.active = True
    attack = AdversarialHook(eps=2, alpha=2.5)
    attack.scale = 1.0
    for key, value in dict(iter=0, epoch=0, max_iters=2, max_epochs=1).items():  # what some heads ask for
        MessageHub.get_current_instance().update_info(key, value)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        step(twin, optimizer, copy.deepcopy(raw), attack)
        evidence.synchronize(bench.device)
        seconds.append(round(time.perf_counter() - start, 3))
    report = pruner.freeze()
    twin.eval()
    with torch.no_grad():
        found = twin.test_step(copy.deepcopy(raw))
    finite = all(bool(torch.isfinite(p).all()) for p in twin.parameters())
    bench.note(
        step_seconds=seconds,
        ops_kept=report.ratio,
        detections=[len(sample.pred_instances) for sample in found],
        peak_gib=evidence.peak_memory(bench.device),
    )
    if not finite:
        raise RuntimeError("weights that are not finite after two steps")


def shrink(cfg: Any) -> None:
    """ResNet-18 in place of ResNet-50, and few proposals."""
    cfg.model.backbone.update(depth=18, init_cfg=None)
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    for settings in (cfg.model.train_cfg.get("rpn_proposal"), cfg.model.test_cfg.get("rpn")):
        if settings is not None:
            settings.update(nms_pre=50, max_per_img=20)


def retinanet(bench: Bench) -> None:
    """RetinaNet-R50."""
    detector(bench, "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", compares=True)


def faster_rcnn(bench: Bench) -> None:
    """Faster R-CNN-R50; its proposals are drawn at random, so that its loss is the device's own."""
    detector(bench, "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", compares=False)


PARTS = [
    Part("tests", tests, 90),
    Part("resnet20", resnet20, 60),
    Part("centernet", centernet, 90),
    Part("retinanet", retinanet, 45),
    Part("faster_rcnn", faster_rcnn, 45),
]


def parts(args: argparse.Namespace) -> list[Part]:
    return PARTS


if __name__ == "__main__":
    evidence.main(__doc__, __file__, parts, MINUTES)
