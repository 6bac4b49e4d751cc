"""Trains a CIFAR config as ``tools/train.py`` does, and writes down what the run costs and what it gives.

    python benchmarks/measured.py configs/cifar10/resnet20_cifar10_psi50_short.py --seed 0 [--epochs E]
        [--random-structure 0.3 | --narrow 0.3] [--start WEIGHTS] [--work-dir DIR] [--metrics FILE.json]
        [--data-root DIR] [--cfg-options KEY=VALUE ...]

After every epoch the metrics file gets the accuracy on the test set, processor seconds of training alone (validation,
checks of the structure and start-up left out), and the operations and parameters kept; at the end, the final figures. A
run that was stopped goes on from its last checkpoint when the same command is given again, with the figures that it
would have had in one piece (``FastCIFAR10``'s draws do not depend on where a run was stopped).

``--epochs`` trains the config's own complete cycle of learning rate and momentum in another number of epochs,
``--times`` in a multiple of its own.

``--random-structure RATIO`` is a control: before the first step a share of every block's inner channels is drawn at
random (shares uniform in 0.1 to 1, scaled together to RATIO of the operations), the rest is cut out of the network,
and the small network is initialised and trained by the config from the first epoch on. How many epochs the processor
time of the config's own dense ones is worth is measured at the start (:func:`step_cost`).

``--narrow RATIO`` is another one: the network that ``mmitp control`` makes of the config, every tensor narrower by the
same part, with the channels of the largest L1 norms of ``--start``, if weights are given.
"""

import argparse
import copy
import hashlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mmitp  # noqa: F401  isort: skip  (first: makes the stack below importable without compiled operators)

import torch
from mmengine import Config, ConfigDict
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import EpochBasedTrainLoop, Runner
from records import write_json
from torch import nn

from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.engine.narrow import narrow_control
from mmitp.engine.resume import newest_good
from mmitp.engine.run import build_runner
from mmitp.engine.surgery import without_runner_hooks
from mmitp.pruning import MacBudget, freeze_masks, masked_layers, project
from mmitp.pruning.check import counted_macs
from mmitp.pruning.latency import processor
from mmitp.pruning.report import parameter_counts
from mmitp.pruning.slim import apply_plan, plan_slim
from mmitp.pruning.verify import copy_of

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (32, 32)


@dataclass(frozen=True)
class Task:
    """What a run is judged by.

    Attributes:
        shape: (H, W) at which operations are counted.
        metric: mmengine's name of the validation's figure, in percent or, by ``scale`` = 100, as a fraction.
        name: of this figure in the metrics file.
        scale: factor to percent.
    """

    shape: tuple[int, int] = SHAPE
    metric: str = "accuracy/top1"
    name: str = "accuracy"
    scale: float = 1.0


CIFAR = Task()
#: options whose value is a place on this machine: a recorded command leaves them out
LOCAL = ("--work-dir", "--metrics", "--data-root")


def sizes(model: nn.Module, shape: tuple[int, int] = SHAPE) -> dict[str, int]:
    """MACs and parameters that a network has, or keeps under its masks, on images of (H, W)."""
    example = blank_example(model, shape)
    if masked_layers(model):
        with without_runner_hooks(model):  # an attack's, say
            budget = MacBudget(model, example)
            return dict(macs=budget.kept_macs(), params=parameter_counts(model, budget)[1])
    return dict(macs=counted_macs(model, example), params=sum(p.numel() for p in model.parameters()))


def channels(model: nn.Module, shape: tuple[int, int] = SHAPE) -> dict[str, list[int]]:
    """Channels that each layer reads and computes, by its name; of a masked network those that it keeps."""
    if masked_layers(model):
        with without_runner_hooks(model):
            plan = plan_slim(model, MacBudget(model, blank_example(model, shape)))
        model = apply_plan(copy_of(model), plan)
    pairs = (("in_channels", "out_channels"), ("in_features", "out_features"))
    weighted = [(name, layer) for name, layer in model.named_modules() if "weight" in layer._parameters]
    return {
        name: [getattr(layer, a), getattr(layer, b)]
        for (name, layer), (a, b) in itertools.product(weighted, pairs)
        if hasattr(layer, a) and hasattr(layer, b)
    }


def judged_model(runner: Runner) -> nn.Module:
    """The network that a Runner validates: the averaged one, where a hook averages."""
    averaged = (hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook))
    return next(averaged, runner.model)


def dense_sizes(cfg: Config) -> dict[str, int]:
    """MACs and parameters of ResNet-20 or -56 at their full width, whatever the config makes of them."""
    model = dense_model(cfg)
    model.backbone.pop("base_channels", None)
    model.head.in_channels = 64
    init_default_scope(cfg.default_scope)
    return sizes(MODELS.build(model))


def dense_model(cfg: Config) -> ConfigDict:
    """The config's model without masks."""
    model = copy.deepcopy(cfg.model)
    if "of" in model:
        model.type = model.pop("of")
        model.pop("prune", None)
    if "data_preprocessor" not in model:  # mmpretrain's configs have it beside the model
        model.data_preprocessor = cfg.data_preprocessor
    return model


def recorded_command(argv: list[str]) -> str:
    """The command line without this machine's folders; of an earlier run's files their folder and name."""
    words, rest = [f"benchmarks/{Path(argv[0]).name}"], iter(argv[1:])
    for word in rest:
        if word in LOCAL:
            next(rest, None)
        else:
            words.append("/".join(Path(word).parts[-2:]) if os.path.isabs(word) else word)
    return "python " + " ".join(words)


def origin() -> dict[str, Any]:
    """Commit, versions, machine and command of a run."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    versions = {"python": platform.python_version()}
    for package in ("torch", "onedl-mmengine", "mmengine", "onedl-mmpretrain", "mmpretrain", "torch-pruning"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return dict(
        commit=git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        versions=versions,
        machine=f"{processor('cpu')}, {torch.backends.cpu.get_cpu_capability()}",
        command=recorded_command(sys.argv),
    )


class Metrics(Hook):
    """Writes a run's metrics file, and keeps its figures in the checkpoints, so that they go on with the run.

    Args:
        path: the file.
        head: what is known of the run beforehand; its ``macs_dense`` and ``params_dense`` are what ratios refer to.
        fingerprint: of all that the training depends on; a checkpoint of another one is refused.
        task: what the run is judged by.
    """

    priority = "VERY_HIGH"

    def __init__(self, path: Path, head: dict[str, Any], fingerprint: str, task: Task = CIFAR) -> None:
        self.path, self.head, self.fingerprint, self.task = path, head, fingerprint, task
        self.epochs: list[dict[str, Any]] = []
        self.seconds = dict(train=0.0, wall=0.0)
        self.resumed = 0

    # -- the clock

    def _start(self, runner: Runner) -> None:
        self.since = time.process_time(), time.perf_counter()

    def _stop(self, runner: Runner) -> None:
        now = time.process_time(), time.perf_counter()
        self.seconds["train"] += now[0] - self.since[0]
        self.seconds["wall"] += now[1] - self.since[1]
        self.since = now

    before_train = after_val = _start
    after_train = before_val = _stop

    # -- the file

    def after_train_epoch(self, runner: Runner) -> None:
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._stop(runner)
            self._note(runner, dict(epoch=runner.epoch + 1))
            self._start(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._note(runner, dict(iteration=runner.iter))

    def _note(self, runner: Runner, when: dict[str, int]) -> None:
        size = sizes(runner.model, self.task.shape)
        self.epochs.append(
            {
                **when,
                self.task.name: None,
                "train_seconds": round(self.seconds["train"], 1),
                "ops_kept": round(size["macs"] / self.head["macs_dense"], 4),
                "params_kept": round(size["params"] / self.head["params_dense"], 4),
            }
        )
        self.write(state="running")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self.epochs and metrics is not None:
            # mmdet's CocoMetric gives nothing at all where no box was found
            value = metrics[self.task.metric] if metrics else 0.0
            self.epochs[-1][self.task.name] = round(value * self.task.scale, 2)
            self.write(state="running")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._stop(runner)
        checkpoint["measured"] = copy.deepcopy(dict(epochs=self.epochs, seconds=self.seconds, resumed=self.resumed))
        checkpoint["measured"].update(
            fingerprint=self.fingerprint, start=self.head.get("start"), commit=self.head["commit"]
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume:
            return  # weights to start from, no part of this run
        known, start = checkpoint.get("measured"), self.head.get("start")
        if known is None or known["fingerprint"] != self.fingerprint or known.get("start", start) != start:
            raise ValueError(
                f"{runner.work_dir} holds checkpoints of another run (its config, seed, length or start was another "
                "one): remove the folder, or give another --work-dir"
            )
        self.epochs, self.seconds, self.resumed = known["epochs"], known["seconds"], known["resumed"] + 1
        earlier = known.get("commit", "").split(", ")
        self.head["commit"] = ", ".join(dict.fromkeys(filter(None, [*earlier, self.head["commit"]])))
        if self.path.is_file() and self.epochs:  # validation comes after the checkpoint
            written = json.loads(self.path.read_text(encoding="utf-8"))["epochs"]
            figures = {entry["epoch"]: entry[self.task.name] for entry in written}
            self.epochs[-1][self.task.name] = figures.get(self.epochs[-1]["epoch"])

    def write(self, state: str, **more: Any) -> dict[str, Any]:
        result = dict(self.head, state=state, resumed=self.resumed, epochs=self.epochs, **more)
        write_json(self.path, result)
        return result


def one_cycle(cfg: Config, length: float, by_epoch: bool = True, peak: float | None = None) -> list[dict]:
    """The config's one-cycle, of the learning rate and of the momentum, in another length, unit and peak rate."""
    rate, *momentum = (dict(scheduler) for scheduler in cfg.param_scheduler)
    factor = length / rate["total_steps"]
    rate.update(total_steps=length, eta_max=peak or rate["eta_max"])
    for scheduler in momentum:
        for key in {"begin", "end"} & scheduler.keys():
            scheduler[key] *= factor
    if not by_epoch:
        for scheduler in (rate, *momentum):
            scheduler.update(by_epoch=False, convert_to_iter_based=False)
            scheduler.update({key: round(scheduler[key]) for key in {"begin", "end"} & scheduler.keys()})
    return [rate, *momentum]


def stretch(cfg: Config, epochs: int) -> None:
    """Gives the config another number of epochs."""
    cfg.param_scheduler = one_cycle(cfg, epochs)
    cfg.train_cfg.max_epochs = epochs


def step_cost(
    small: nn.Module, dense: nn.Module, batch: dict, optimizer: ConfigDict, rounds: int = 30
) -> dict[str, float]:
    """Processor time of a training step of ``small`` over that of ``dense`` (see :func:`paired_steps`)."""
    nets = [copy.deepcopy(net).train() for net in (small, dense)]
    return paired_steps(nets, [build_optim_wrapper(net, copy.deepcopy(optimizer)) for net in nets], batch, rounds)


def paired_steps(nets: list[Any], wrappers: list[Any], batch: dict, rounds: int = 30) -> dict[str, float]:
    """Processor time of a step of the first of two networks over one of the second: median and quartiles.

    The two take single steps in turn, so that what else runs on the machine weighs on both alike.
    """
    ratios = []
    for i in range(-2, rounds):  # two rounds to warm up
        seconds = [0.0, 0.0]
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.process_time()
            nets[which].train_step(copy.copy(batch), wrappers[which])
            seconds[which] = time.process_time() - start
        if i >= 0:
            ratios.append(seconds[0] / seconds[1])
    return spread_of(ratios)


def spread_of(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles, rounded."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return dict(median=round(median, 4), quartile_1=round(low, 4), quartile_3=round(high, 4), rounds=len(ratios))


def first_batch(cfg: Config) -> dict:
    return next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))


def random_structure(cfg: Config, ratio: float, seed: int) -> dict[str, Any]:
    """Draws a network of at most ``ratio`` of the operations: the spec of ``mmitp.SlimModel`` and the inner widths.

    A block's inner channels number by their rank r in (0, 1]; u / r with u uniform in (0.1, 1) a block is the channel's
    mask, and the freeze switches the lowest of all blocks off: shares in proportion to u, as far as whole channels go.
    """
    inner = [f"backbone.layer{s}.{b}.conv2" for s in (1, 2, 3) for b in range((cfg.model.backbone.depth - 2) // 6)]
    prune = dict(include=inner)
    model = MODELS.build(dict(dense_model(cfg), type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier", prune=prune))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in masked_layers(model).values():
            n = layer.prune_mask.numel()
            share = 0.1 + 0.9 * float(torch.rand((), generator=generator))
            layer.prune_mask.copy_(share * n / (torch.randperm(n, generator=generator) + 1.0))
    model.eval()
    budget = MacBudget(model, blank_example(model, SHAPE))
    freeze_masks(model, budget.split(project(budget, ratio, fill=True).pattern))
    widths = [int(layer.binary_mask().sum()) for layer in masked_layers(model).values()]
    return dict(spec=plan_slim(model, budget).spec(), widths=widths)


def fingerprint(cfg: Config) -> str:
    """Of what a training depends on, less where things are."""
    apart = ("work_dir", "resume", "load_from", "default_hooks")
    kept = copy.deepcopy({key: value for key, value in cfg.items() if key not in apart})
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        kept[key]["dataset"].pop("data_root", None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def configured(args: argparse.Namespace, config: str) -> Config:
    cfg = load_config(config, args.cfg_options, args.work_dir)
    if args.data_root:
        for split in ("train", "val", "test"):
            cfg[f"{split}_dataloader"].dataset.data_root = args.data_root
    if args.batches:
        cfg.train_dataloader.num_batch_per_epoch = args.batches
    if cfg.train_dataloader.get("num_workers"):  # the processor time of other processes would not be counted
        cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.randomness = dict(seed=args.seed)
    cfg.resume = True  # from the last checkpoint in work_dir, if there is one
    init_default_scope(cfg.default_scope)
    return cfg


def start_from(cfg: Config, weights: str | None) -> dict[str, str]:
    """Lets a run start from weights, if there are any; a stopped one goes on from its own checkpoint.

    Returns:
        What its metrics say: ``start``, the run that left them (its folder's name), or the published file's name.
    """
    if weights is None:
        return {}
    if newest_good(cfg) is None:
        cfg.load_from, cfg.resume = weights, False
    path = Path(weights)
    return dict(start=path.parent.name if path.name == "weights.pth" else path.stem)


def metrics_file(args: argparse.Namespace, cfg: Config) -> Path:
    return Path(args.metrics or Path(cfg.work_dir) / "metrics.json")


def measured_run(
    cfg: Config,
    path: Path,
    head: dict[str, Any],
    model: nn.Module | None = None,
    optim_wrapper: OptimWrapper | None = None,
    after: Callable[[Runner], nn.Module] | None = None,
    task: Task = CIFAR,
) -> dict[str, Any]:
    """Trains, validates and returns the metrics, less what only the caller knows.

    Args:
        cfg: from :func:`configured`.
        path: the metrics file.
        head: what is known beforehand (:func:`head_of`).
        model: takes the place of the config's.
        optim_wrapper: likewise.
        after: called with the trained runner; the network it returns is validated and counted instead.
        task: what the run is judged by.
    """
    runner = build_runner(cfg)
    if model is not None:
        runner.model = model
    if optim_wrapper is not None:
        runner.optim_wrapper = optim_wrapper
    metrics = Metrics(path, head, fingerprint(cfg), task)
    runner.register_hook(metrics)
    runner.train()
    if not metrics.epochs or metrics.epochs[-1][task.name] is None:  # stopped between the last step and validation
        runner.val_loop.run()
    if after is not None:
        runner.model = after(runner)
        runner.val_loop.run()
    torch.save(judged_model(runner).state_dict(), Path(cfg.work_dir) / "weights.pth")
    size = sizes(runner.model, task.shape)
    return metrics.write(
        "trained",
        **{task.name: metrics.epochs[-1][task.name]},
        iterations=runner.iter,
        **size,
        ops_kept=size["macs"] / head["macs_dense"],
        params_kept=size["params"] / head["params_dense"],
        channels=channels(runner.model, task.shape),
        train_seconds=round(metrics.seconds["train"], 1),
        wall_seconds=round(metrics.seconds["wall"], 1),
    )


def finish(path: Path, result: dict[str, Any], **more: Any) -> None:
    """Marks a run's metrics as complete and prints them."""
    result = dict(result, **more, state="finished")
    write_json(path, result)
    print(json.dumps({k: v for k, v in result.items() if k != "epochs"}, indent=1))


def head_of(args: argparse.Namespace, cfg: Config, config: str) -> dict[str, Any]:
    dense = dense_sizes(cfg)
    return dict(
        config=Path(config).stem,
        options=args.cfg_options,
        seed=args.seed,
        **origin(),
        macs_dense=dense["macs"],
        params_dense=dense["params"],
    )


def settled(args: argparse.Namespace) -> Config:
    """The config of a run, in the run's own length."""
    cfg = configured(args, args.config)
    if args.epochs or args.times > 1:
        stretch(cfg, args.epochs or args.times * cfg.train_cfg.max_epochs)
    return cfg


def train(args: argparse.Namespace) -> None:
    cfg = settled(args)
    head = head_of(args, cfg, args.config)
    if args.narrow:
        head.update(narrowed(cfg, args.narrow, args.start, dense_epochs=load_config(args.config).train_cfg.max_epochs))
    head.update(start_from(cfg, args.start))
    if args.narrow and args.start and cfg.load_from:
        cfg.load_from = str(control_of(cfg) / "weights.pth")
    if args.times > 1:
        head["times"] = args.times
    if args.epochs:
        head["length"] = args.epochs
    if args.random_structure:
        head.update(drawn(cfg, args.random_structure, args.seed))
    path = metrics_file(args, cfg)
    finish(path, measured_run(cfg, path, head))


def drawn(cfg: Config, ratio: float, seed: int) -> dict[str, Any]:
    """Puts a random structure into the config, with as many epochs as the time is worth; what to write down of it."""
    structure = random_structure(cfg, ratio, seed)
    dense = dense_model(cfg)
    cfg.model = ConfigDict(dense, type="mmitp.SlimModel", of="mmpretrain.ImageClassifier", slim=structure["spec"])
    cost = cost_over(cfg, dense)
    epochs, length = cfg.train_cfg.max_epochs, round(cfg.train_cfg.max_epochs / cost["median"])
    stretch(cfg, length)
    return dict(
        inner_widths=structure["widths"],
        step_cost=cost,
        relative_cost=round(length * cost["median"] / epochs, 4),
    )


def cost_over(cfg: Config, dense: ConfigDict) -> dict[str, float]:
    """What a step of the config's network costs over one of a dense one; a resumed run keeps what it measured."""
    known = Path(cfg.work_dir) / "step_cost.json"
    if not known.is_file():
        nets = [MODELS.build(copy.deepcopy(model)) for model in (cfg.model, dense)]
        cost = step_cost(nets[0], nets[1], first_batch(cfg), cfg.optim_wrapper)
        write_json(known, dict(step_cost=cost))
    return json.loads(known.read_text(encoding="utf-8"))["step_cost"]


def control_of(cfg: Config) -> Path:
    """Where the config's control is written."""
    return Path(cfg.work_dir) / "control"


def narrowed(cfg: Config, ratio: float, weights: str | None, dense_epochs: int) -> dict[str, Any]:
    """Puts the config's control in the place of its model; what to write down of it."""
    folder = control_of(cfg)
    narrow_control(cfg, str(folder), ratio, 1, weights, scratch=weights is None, shape=SHAPE)
    dense = dense_model(cfg)
    cfg.model = Config.fromfile(folder / "config.py").model
    cost = cost_over(cfg, dense)
    length = cfg.train_cfg.max_epochs
    return dict(narrow=ratio, step_cost=cost, relative_cost=round(length * cost["median"] / dense_epochs, 4))


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--start", metavar="WEIGHTS", help="to start from; random ones where it is left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config name>)")
    parser.add_argument("--metrics", help="the metrics file (default: metrics.json in the work dir)")
    parser.add_argument("--data-root", help="folder of cifar-10-batches-py (default: the config's)")
    parser.add_argument("--batches", type=int, help="batches an epoch, to try the script on cut data")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--epochs", type=int, help="the config's cycle in so many epochs")
    parser.add_argument("--times", type=int, default=1, help="the config's cycle in so many times its epochs")
    structure = parser.add_mutually_exclusive_group()
    structure.add_argument(
        "--random-structure", type=float, metavar="RATIO", help="of the operations, drawn at epoch 0"
    )
    structure.add_argument(
        "--narrow", type=float, metavar="RATIO", help="of the operations, the same part of every tensor"
    )
    add_run_options(parser)
    return parser


def main() -> None:
    args = command_line().parse_args()
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
