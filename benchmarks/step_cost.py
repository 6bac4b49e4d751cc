"""What a training iteration costs while masks train: whole iterations of mmengine's Runner, masked against dense.

    python benchmarks/step_cost.py [resnet20 resnet56 dla34 dla34_quarter] [--rounds 20] [--threads 1]
        [--batch N] [--ops]

Runners of the repository's own configs stand side by side, on a fixed batch of noise: the dense model, the masked one
with ``PruneHook(b=10)`` and the one with ``b='auto'``. An iteration is ``run_iter``: all hooks, forward, losses,
backward, optimizer, Optimizer 2, message hub. Rounds alternate between the Runners in changing order, and ratios are
taken round by round, because machines are shared; for the same reason seconds are the process's CPU time with one
thread, and wall time with more. Masks on weights cost the same at any batch, so a small ``--batch`` shows the
difference clear of the noise. ``--ops`` counts the operators that torch dispatches in an iteration, which no other
load disturbs: on a GPU each of them is a launch, and launches are what small networks wait for.

Masks are spread around zero and the window stands where its path passes their ratio, so that channels cross zero all
the time, as in the middle of a run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import mmitp  # noqa: F401  makes the OpenMMLab stack importable without compiled operators
from mmitp.engine.hooks import PruneHook
from mmitp.pruning.pressure import PathFollower

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, LENGTH = 100, 100


class Count(TorchDispatchMode):
    """Counts dispatched operators that compute: views and allocations launch nothing."""

    FREE = frozenset(
        """view reshape _unsafe_view expand slice select detach alias t transpose permute unsqueeze squeeze split
        split_with_sizes as_strided empty empty_like empty_strided new_empty new_empty_strided unbind _reshape_alias
        is_same_size lift_fresh""".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.overloadpacket.__name__ not in self.FREE
        return func(*args, **(kwargs or {}))


class Meter:
    """Seconds or operators between two points; what PruneHook itself spends is added up besides."""

    def __init__(self, count: bool, cpu_time: bool) -> None:
        self.clock = time.process_time if cpu_time else time.perf_counter
        self.counter = Count() if count else None
        self.in_hook = 0.0

    def now(self) -> float:
        return self.clock() if self.counter is None else float(self.counter.n)

    def iteration(self, runner: Runner, batch: Any, i: int) -> tuple[float, float]:
        """Cost of one iteration, and the hook's share of it."""
        self.in_hook = 0.0
        start = self.now()
        with self.counter or nullcontext():
            runner.train_loop.run_iter(i, batch)
        return self.now() - start, self.in_hook


class MeteredHook(PruneHook):
    meter: Meter

    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        start = self.meter.now()
        super()._take_gradients(optimizer)
        self.meter.in_hook += self.meter.now() - start

    def _optimizer_2(self) -> None:
        start = self.meter.now()
        super()._optimizer_2()
        self.meter.in_hook += self.meter.now() - start

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        start = self.meter.now()
        super().after_train_iter(*args, **kwargs)
        self.meter.in_hook += self.meter.now() - start


class StandingLoop(EpochBasedTrainLoop):
    """A train loop that stands ready for ``run_iter`` where the usual one would begin its first epoch."""

    def run(self) -> Any:
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        return self.runner.model


def classifier(depth: int, batch: int) -> tuple[Config, Any]:
    from mmpretrain.structures import DataSample

    cfg = Config.fromfile(str(ROOT / f"configs/cifar10/resnet{depth}_cifar10.py"))
    samples = [DataSample().set_gt_label(i % 10) for i in range(batch)]
    images = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in samples]
    return cfg, dict(inputs=images, data_samples=samples)


def detector(width: float, batch: int, shape: tuple[int, int]) -> tuple[Config, Any]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    cfg = Config.fromfile(str(ROOT / "configs/kitti/centernet_dla34_kitti.py"))
    channels = [int(c * width) for c in (64, 128, 256, 512)]
    cfg.merge_from_dict({"model.backbone.width": width, "model.backbone.init_cfg": None})
    cfg.merge_from_dict({"model.neck.in_channels": channels, "model.bbox_head.in_channels": channels[0]})
    cfg.merge_from_dict({"model.bbox_head.feat_channels": int(256 * width)})
    samples = []
    for _ in range(batch):
        boxes = InstanceData(bboxes=torch.tensor([[20.0, 30, 80, 70], [150, 40, 200, 90]]), labels=torch.tensor([0, 1]))
        samples.append(
            DetDataSample(
                metainfo=dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0)),
                gt_instances=boxes,
            )
        )
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for _ in samples]
    return cfg, dict(inputs=images, data_samples=samples)


NETS = dict(
    resnet20=lambda batch: classifier(20, batch or 128),
    resnet56=lambda batch: classifier(56, batch or 128),
    dla34=lambda batch: detector(1.0, batch or 2, (96, 320)),
    dla34_quarter=lambda batch: detector(0.25, batch or 8, (128, 384)),
)


def make_runner(
    net: str, b: float | str | None, work_dir: str, meter: Meter, batch_size: int | None
) -> tuple[Runner, Any]:
    torch.manual_seed(0)
    cfg, batch = NETS[net](batch_size)
    model = cfg.model
    if meter.counter is not None:
        cfg.optim_wrapper.optimizer.foreach = True  # as torch does by itself on a GPU
    if "data_preprocessor" in cfg:
        model.data_preprocessor = cfg.data_preprocessor
    if b is not None:
        model = dict(model, type="mmitp.MaskedModel", of=model.type)
    MeteredHook.meter = meter
    runner = Runner(
        model=model,
        work_dir=work_dir,
        train_dataloader=DataLoader([batch] * LENGTH, batch_size=None),
        train_cfg=dict(type=StandingLoop, max_epochs=EPOCHS),
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        default_hooks=dict(cfg.default_hooks, checkpoint=None, sampler_seed=None),
        custom_hooks=[] if b is None else [MeteredHook(0.5, b, 0, EPOCHS, lr=1e-4)],
        default_scope=cfg.default_scope,
        log_level="WARNING",
        experiment_name=f"{net}_{b}",
    )
    runner.train()
    return runner, batch


def to_the_middle(runner: Runner) -> None:
    """Masks around zero, and the window where the path passes their ratio."""
    hook = next(h for h in runner.hooks if isinstance(h, PruneHook))
    for layer in hook.masks.values():
        torch.nn.init.normal_(layer.prune_mask, 0.5, 0.5)
    assert hook.pruner is not None
    follower, ratio = PathFollower(hook.target, hook.window_steps), hook.pruner.ratio()
    position = next(s for s in range(hook.window_steps) if follower.wanted(s) <= ratio)
    hook.pruner.load_state_dict({**hook.pruner.state_dict(), "count": position, "position": position})


def spread(values: list[float], digits: int = 3) -> str:
    return " / ".join(f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS), metavar="net", help=f"of {', '.join(NETS)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="images in a batch; by default that of the net's usual training")
    parser.add_argument("--ops", action="store_true", help="count operators instead of seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    variants: dict[str, float | str | None] = {"dense": None, "b=10": 10.0, "b='auto'": "auto"}
    meter = Meter(args.ops, args.threads == 1)
    with tempfile.TemporaryDirectory() as work_dir:
        for net in args.nets:
            runners = {name: make_runner(net, b, work_dir, meter, args.batch) for name, b in variants.items()}
            for name, (runner, batch) in runners.items():
                runner.train_loop.run_iter(0, batch)
                if name != "dense":
                    to_the_middle(runner)
                runner.train_loop.run_iter(1, batch)
            measure(net, runners, meter, 3 if args.ops else args.rounds)


def measure(net: str, runners: dict[str, tuple[Runner, Any]], meter: Meter, rounds: int) -> None:
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    names = list(runners)
    for i in range(rounds):
        for name in names[i % 3 :] + names[: i % 3]:
            costs[name].append(meter.iteration(*runners[name], i + 2))
    unit, digits = ("s", 4) if meter.counter is None else ("operators", 0)
    print(f"{net}: torch {torch.__version__}, {torch.get_num_threads()} thread(s), {rounds} rounds; min / median / max")
    for name, values in costs.items():
        ratios = [a / b for (a, _), (b, _) in zip(values, costs["dense"], strict=True)]
        more = [a - b for (a, _), (b, _) in zip(values, costs["dense"], strict=True)]
        hook = [h / b for (_, h), (b, _) in zip(values, costs["dense"], strict=True)]
        print(
            f"{name:>10}: {spread([v for v, _ in values], digits)} {unit}; to dense {spread(ratios)}, "
            f"more {spread(more, digits)}, PruneHook's part {spread(hook)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
