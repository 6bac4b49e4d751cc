"""What a whole pruned run costs with ``slim_at_end``, against the dense run: iterations weighted by the schedule.

    python benchmarks/whole_run.py [resnet20 resnet56 centernet_demo centernet rtmdet_bccd] [--rounds 20] [--threads 1]
        [--divisor auto]
    python benchmarks/whole_run.py configs/cifar10/NAME_psi30_early.py --dense configs/cifar10/NAME.py
        [--slim-every 0.2]

Four Runners of one of the repository's pruned configs stand side by side on a fixed batch of noise: the dense model,
the masked one before the window, the masked one in it (Optimizer 2 at every step), and the one that the hook has
slimmed at the freeze. Each round takes one whole iteration of each, in changing order; with the config's own window and
epochs the run costs

    (begin * before + (end - begin) * window + (epochs - end) * slimmed) / (epochs * dense)

taken round by round, because machines are shared. Data loading, evaluation and the slimming itself (once a run,
printed) are left out. What is slimmed comes from a window of some thirty steps on noise under ``b='auto'``, which
shares out the cut over the layers as a training would; under a fixed ``b`` the masks are drawn at random and cut to the
target by the freeze. With ``--slim-every``, a part of the window, progressive slimming cuts the network after each such
part, and a Runner stands in every one. One thread is timed in CPU seconds, several by the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import spread_of  # makes the OpenMMLab stack importable without compiled operators
from mmengine import Config
from mmengine.runner import EpochBasedTrainLoop, Runner
from sweep import whole_run
from torch import nn
from torch.utils.data import DataLoader

from mmitp.engine.config import load_config
from mmitp.engine.hooks import PruneHook
from mmitp.engine.window import is_part, whole_units
from mmitp.models.report import random_batch

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
#: name -> config, batch, (H, W)
NETS: dict[str, tuple[str, int, tuple[int, int]]] = dict(
    resnet20=("cifar10/resnet20_cifar10_psi50.py", 128, (32, 32)),
    resnet56=("cifar10/resnet56_cifar10_psi50.py", 128, (32, 32)),
    centernet_demo=("demo/centernet_scenes_prune50.py", 8, (128, 384)),
    centernet=("kitti/centernet_dla34_kitti_prune50.py", 1, (384, 1280)),
    rtmdet_bccd=("bccd/rtmdet_tiny_bccd_prune50.py", 2, (192, 256)),
)
PHASES = ("dense", "before", "window", "slimmed")


class StandingLoop(EpochBasedTrainLoop):
    """Stands ready for ``run_iter`` where the usual loop would begin its first epoch."""

    def run(self) -> nn.Module:
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        return self.runner.model


def stand(
    file: Path,
    phase: str,
    size: int,
    shape: tuple[int, int],
    work_dir: str,
    slimming: dict[str, Any] | None = None,
    cuts: int = 0,
    beside: list[Any] | None = None,
) -> tuple[Runner, Any]:
    """A Runner that stands in one phase of the run, and its batch.

    ``slimming`` are PruneHook's options in the window with ``slim_every`` and at its end, ``cuts`` how often the
    network in the window has been cut, ``beside`` custom hooks in place of the config's.
    """
    cfg = load_config(str(file), work_dir=work_dir)
    if beside is not None:
        cfg.custom_hooks = beside
    hook = prune_hook(cfg)
    if hook is not None and not hook.get("by_epoch", True):  # what a step costs does not depend on the schedule
        _, end = window_epochs(hook, cfg.train_cfg.max_epochs)
        for other in cfg.custom_hooks:
            if other is not hook and other.get("begin", 0) >= end:  # it acts beside the small network alone
                other.begin = 2
        hook.update(begin=1, end=2, by_epoch=True)
    if phase == "dense" and hook is not None:
        cfg.model.type = cfg.model.pop("of")
        cfg.model.pop("prune", None)
        cfg.custom_hooks.remove(hook)
    elif phase == "slimmed" or "slim_every" in (slimming or {}):
        assert hook is not None
        hook.update(slimming or {})
    model = cfg.model
    if "data_preprocessor" in cfg:
        model.data_preprocessor = cfg.data_preprocessor
    torch.manual_seed(0)
    runner = Runner(
        model=model,
        work_dir=work_dir,
        train_dataloader=DataLoader([None] * epoch_length(hook, cfg.train_cfg.max_epochs), batch_size=None),
        train_cfg=dict(type=StandingLoop, max_epochs=cfg.train_cfg.max_epochs),
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        default_hooks=dict(cfg.default_hooks, checkpoint=None, sampler_seed=None),
        custom_hooks=cfg.get("custom_hooks"),
        default_scope=cfg.default_scope,
        log_level="ERROR",
        experiment_name=f"{file.stem}_{phase}",
    )
    runner.train()
    batch = random_batch(runner.model, shape, size, torch.Generator().manual_seed(0))
    runner.train_loop.run_iter(0, batch)
    if phase == "window":
        pruning = hook_of(runner)
        runner.train_loop._epoch = pruning.begin
        if cuts:
            steps_of_the_window(runner, shape, size, cuts * pruning.pruner.slim_every + 1)
        pruning.pruner.slim_every = None  # no cut while steps are timed
    elif phase == "slimmed":
        pruning = hook_of(runner)
        if pruning.pruner.path is not None:
            runner.train_loop._epoch = pruning.begin
            steps_of_the_window(runner, shape, size, pruning.window_steps)
        else:
            for layer in pruning.masks.values():
                nn.init.normal_(layer.prune_mask, 0.5, 0.5)
        runner.train_loop._epoch = pruning.end - 1
        start = time.perf_counter()
        pruning.after_train_epoch(runner)
        print(f"{file.stem}: the freeze and the slimming took {time.perf_counter() - start:.1f} s")
        runner.train_loop._epoch = pruning.end
    return runner, batch


def steps_of_the_window(runner: Runner, shape: tuple[int, int], size: int, steps: int) -> None:
    few = random_batch(runner.model, shape, min(size, 8), torch.Generator().manual_seed(0))
    for i in range(steps):
        runner.train_loop.run_iter(i, few)


def epoch_length(hook: Any, epochs: int, window: int = 30) -> int:
    """Iterations an epoch of the standing loop, for a pruning window of about ``window``."""
    if hook is None:
        return 100
    part = hook["end"] - hook["begin"]  # in epochs, or of the run
    return max(round(window / (part * epochs if part < 1 else part)), 1)


def window_epochs(hook: Any, epochs: int) -> tuple[float, float]:
    """Where the pruning window of a run of so many epochs begins and ends, in epochs.

    Raises:
        SystemExit: the window is given in iterations, whose number an epoch depends on the data.
    """
    bounds = hook["begin"], hook["end"]
    if hook.get("by_epoch", True):
        return whole_units(bounds[0], epochs), whole_units(bounds[1], epochs)
    if not all(bound == 0 or is_part(bound) for bound in bounds):  # the start is the same in any unit
        raise SystemExit(f"whole_run.py needs a window in parts of the run with by_epoch=False, got {bounds}")
    return bounds[0] * epochs, bounds[1] * epochs


def prune_hook(cfg: Config) -> Any:
    """The config's PruneHook, or None."""
    return next((h for h in cfg.get("custom_hooks") or [] if h.type == "mmitp.PruneHook"), None)


def take_turns(runners: dict[str, tuple[Runner, Any]], rounds: int, now: Callable[[], float]) -> dict[str, list[float]]:
    """Times of whole iterations, one of each Runner a round, in changing order."""
    names = list(runners)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-2, rounds):  # two rounds to warm up
        for name in names[i % len(names) :] + names[: i % len(names)]:
            runner, batch = runners[name]
            start = now()
            runner.train_loop.run_iter(1, batch)
            if i >= 0:
                times[name].append(now() - start)
    return times


def whole_run_cost(
    file: Path,
    dense: Path,
    rounds: int,
    size: int = 128,
    shape: tuple[int, int] = (32, 32),
    slim_every: float | None = None,
    left: Path | None = None,
) -> dict[str, Any]:
    """Processor time of a config's steps over those of a dense config's, and its schedule.

    Medians and quartiles of rounds: ``step`` of a network without masks, else ``before``, ``window`` and, with
    ``slim_at_end``, ``slimmed``. With ``slim_every``, a part of the window, ``window`` gives way to ``window_1`` and so
    on, one after each cut. ``epochs`` says how many of each the run has, ``dense_epochs`` how many the dense one.
    ``left``: config of the slimmed network that such a run left, in place of one that is slimmed here.
    """
    cfg = load_config(str(file))
    hook = prune_hook(cfg)
    epochs, dense_epochs = cfg.train_cfg.max_epochs, load_config(str(dense)).train_cfg.max_epochs
    with tempfile.TemporaryDirectory() as work_dir:
        runners = {"dense": stand(dense, "dense", size, shape, work_dir)}
        if hook is None:
            runners["step"] = stand(file, "dense", size, shape, work_dir)
            spans = {"step": epochs}
        else:
            for phase in ("before", "window", "slimmed")[: 3 if hook.get("slim_at_end") else 2]:
                if phase == "slimmed" and left is not None:
                    beside = [other for other in cfg.custom_hooks if other is not hook]
                    runners[phase] = stand(left, "dense", size, shape, work_dir, beside=beside)
                else:
                    runners[phase] = stand(file, phase, size, shape, work_dir)
            begin, end = window_epochs(hook, epochs)
            spans = {"before": begin, "window": end - begin}
            if slim_every is not None:
                parts = round(1 / slim_every)
                del runners["window"], spans["window"]
                for cuts in range(parts):
                    slimming = dict(slim_every=slim_every, slim_at_end=True)
                    name = f"window_{cuts + 1}"
                    runners[name] = stand(file, "window", size, shape, work_dir, slimming, cuts)
                    spans[name] = (end - begin) / parts
            if "slimmed" in runners:
                spans["slimmed"] = epochs - end
            else:
                spans["before"] += epochs - end  # frozen masks cost what masks at rest do
        times = take_turns(runners, rounds, time.process_time)
    ratios = {phase: [a / b for a, b in zip(times[phase], times["dense"], strict=True)] for phase in spans}
    steps = {name: spread_of(values) for name, values in ratios.items()}
    return dict(steps, epochs=spans, dense_epochs=dense_epochs)


def hook_of(runner: Runner) -> PruneHook:
    return next(h for h in runner.hooks if isinstance(h, PruneHook))


def spread(values: list[float]) -> str:
    return " / ".join(f"{v:.3f}" for v in (min(values), statistics.median(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=["resnet20", "centernet_demo"], metavar="net", help=", ".join(NETS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--divisor", type=lambda word: word if word == "auto" else int(word), default=1, help="PruneHook's"
    )
    parser.add_argument("--dense", metavar="CONFIG", help="the dense twin of a config of CIFAR-10 in place of a net")
    parser.add_argument("--slim-every", type=float, metavar="PART", help="of the window, with --dense: PruneHook's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.dense:
        for config in args.nets:
            entry = whole_run_cost(Path(config), Path(args.dense), args.rounds, slim_every=args.slim_every)
            print(f"{config}: {json.dumps(entry)}; whole run / dense: {whole_run(entry):.3f}", flush=True)
        return
    now = time.process_time if args.threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as work_dir:
        for net in args.nets:
            file, size, shape = NETS[net]
            slimming = dict(slim_at_end=True, fill=True, divisor=args.divisor)
            runners = {phase: stand(CONFIGS / file, phase, size, shape, work_dir, slimming) for phase in PHASES}
            report(net, runners["slimmed"][0], take_turns(runners, args.rounds, now), args)


def report(net: str, runner: Runner, times: dict[str, list[float]], args: argparse.Namespace) -> None:
    hook, epochs = hook_of(runner), runner.max_epochs
    assert hook.slimmed is not None
    print(
        f"{net}: {hook.slimmed['ratio']:.4f} of the operations from epoch {hook.end} of {epochs} on, window from "
        f"{hook.begin}; torch {torch.__version__}, {args.threads} thread(s), "
        f"divisor {args.divisor}, {args.rounds} rounds; min / median / max"
    )
    print(f"{'dense':>10}: {spread(times['dense'])} s")
    for phase in PHASES[1:]:
        ratios = [a / b for a, b in zip(times[phase], times["dense"], strict=True)]
        print(f"{phase:>10} / dense: {spread(ratios)}")
    spans = (hook.begin, hook.end - hook.begin, epochs - hook.end)
    rounds = zip(*(times[phase] for phase in PHASES), strict=True)
    whole = [sum(n * t for n, t in zip(spans, rest, strict=True)) / (epochs * dense) for dense, *rest in rounds]
    print(f" whole run / dense: {spread(whole)}", flush=True)


if __name__ == "__main__":
    main()
