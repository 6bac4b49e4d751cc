"""What FastAT costs a training step: attacked against plain, paired in one run.

    python benchmarks/fastat_cost.py [--net resnet20 | centernet] [--rounds 9]

A step is preprocessing, forward, backward and the optimizer, on random images; the attacked one first perturbs the
batch as AdversarialHook does. Rounds alternate between the two on the same weights, and the ratio is taken round by
round. Times are CPU time of one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.attacks import attack_mode
from mmitp.engine.attack import select_losses
from mmitp.engine.hooks import AdversarialHook

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NETS = dict(
    resnet20=("cifar10/resnet20_cifar10_fastat_short.py", "ResNet-20, batch 128, 32x32"),
    centernet=(
        "demo/centernet_scenes_prune50_robust.py",
        "CenterNet-DLA34 at quarter width with masks, batch 8, 128x384",
    ),
)


def classifier_batch() -> dict[str, Any]:
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i % 10) for i in range(128)]
    return dict(inputs=torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8), data_samples=samples)


def detector_batch() -> dict[str, Any]:
    from mmdet.structures import DetDataSample

    samples = []
    for _ in range(8):
        corner = torch.rand(5, 2) * torch.tensor([300.0, 80.0])
        boxes = torch.cat([corner, corner + 10 + 30 * torch.rand(5, 2)], 1)
        sample = DetDataSample(metainfo=dict(img_shape=(128, 384)))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(0, 3, (5,)))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return dict(inputs=[torch.randint(0, 256, (3, 128, 384), dtype=torch.uint8) for _ in samples], data_samples=samples)


def step(model: Any, optimizer: torch.optim.Optimizer, raw: dict[str, Any], attack: AdversarialHook | None) -> None:
    data = model.data_preprocessor(raw, True)
    if attack is not None:
        with attack_mode(model, batchnorm=attack.batchnorm, dropout=attack.dropout):
            data = attack.perturb(model, data, raw)
    loss = select_losses(model(**data, mode="loss"), None)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=tuple(NETS), default="resnet20")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file, title = NETS[args.net]
    cfg = Config.fromfile(str(CONFIGS / file))
    init_default_scope(cfg.default_scope)
    preprocessor = cfg.model.get("data_preprocessor") or cfg.data_preprocessor
    model = MODELS.build({**cfg.model, "data_preprocessor": preprocessor}).train()
    model.init_weights()
    raw = classifier_batch() if args.net == "resnet20" else detector_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    (settings,) = [dict(hook) for hook in cfg.custom_hooks if hook.type == "mmitp.AdversarialHook"]
    attack = AdversarialHook(**{key: value for key, value in settings.items() if key != "type"})
    attack.scale = 1.0
    times: dict[str, list[float]] = dict(plain=[], attacked=[])
    for i in range(args.rounds + 1):
        for name, hook in (("plain", None), ("attacked", attack)):
            start = time.process_time()
            step(model, optimizer, raw, hook)
            if i:
                times[name].append(time.process_time() - start)
    print(f"{title}, one thread, {torch.__version__}; {args.rounds} rounds; min / median / max")
    for name, values in times.items():
        print(f"{name:>16}: {min(values):.4f} / {statistics.median(values):.4f} / {max(values):.4f} s")
    ratios = [a / b for a, b in zip(times["attacked"], times["plain"], strict=True)]
    print(f"attacked / plain: {min(ratios):.3f} / {statistics.median(ratios):.3f} / {max(ratios):.3f}")


if __name__ == "__main__":
    main()
