"""Train, prune, fine-tune with Torch-Pruning 1.6.1 (``pip install -e ".[bench]"``), in the time of an in-train run.

    python benchmarks/torch_pruning_cifar.py train configs/cifar10/resnet20_cifar10_psi50_short.py OUT/psi50
    python benchmarks/torch_pruning_cifar.py train configs/cifar10/resnet20_cifar10_short.py OUT/dense --epochs 6
    python benchmarks/torch_pruning_cifar.py prune OUT/dense OUT/l1_50 --ratio 0.5 --ranking l1 --seconds S

``train`` runs a config as ``tools/train.py`` does and writes ``result.json`` with its CPU seconds; the first line gives
S. ``--epochs`` shortens a dense config to the first phase of the rival: its own complete one-cycle, lr to the config's
peak. ``prune`` takes that network, prunes it in one shot to at most ``--ratio`` of the multiplications, and fine-tunes
by a second cycle from ``--lr`` for the time that is left; one dense phase serves every pruned network. Data,
augmentation, batch size, optimizer, momentum and decay are the config's in both phases.

Rankings, by the L1 norms of a channel's weights (all weights that go with it: Torch-Pruning's group importance, divided
by the layer's mean):

- ``l1``: channels of all layers compete.
- ``uniform``: the same share of every layer, the smallest first.

Both prune the channels between a block's two convolutions. The residual streams stay whole: Torch-Pruning 1.6.1 reads
the zero-padded shortcut as one that leaves channel numbers alone and would remove wrong ones, and a projection in its
place would be another network than ours. The largest share is taken that fits ``--ratio``.

Time is CPU time of the process (one thread), without validation: on a machine shared with others wall time says little.
S is turned into epochs of the dense network by the dense phase's own seconds; how many iterations of the pruned one
those are worth is measured in alternating rounds at the start (median ratio of the CPU time of training steps).
``--epochs E`` gives the total in epochs of the dense network instead.
"""

import argparse
import copy
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import mmitp  # noqa: F401  isort: skip  (first: makes the stack below importable without compiled operators)

import torch
from mmengine import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import Runner
from torch import nn

from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.engine.run import build_runner
from mmitp.pruning.check import counted_macs

# The layers whose output channels go.
INNER = re.compile(r"backbone\.layer\d\.\d+\.conv1")


class Clock(Hook):
    """CPU and wall seconds of training, without validation."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def _start(self, runner: Runner) -> None:
        self.since = time.process_time(), time.perf_counter()

    def _stop(self, runner: Runner) -> None:
        self.cpu += time.process_time() - self.since[0]
        self.wall += time.perf_counter() - self.since[1]

    before_train = after_val = _start
    after_train = before_val = _stop


def configured(args: argparse.Namespace, config: str) -> Config:
    cfg = load_config(config, args.cfg_options, args.out)
    if args.data_root:
        for split in ("train", "val", "test"):
            cfg[f"{split}_dataloader"].dataset.data_root = args.data_root
    if args.batches:
        cfg.train_dataloader.num_batch_per_epoch = args.batches
    return cfg


def one_cycle(cfg: Config, length: int, by_epoch: bool = True, peak: float | None = None) -> list[dict]:
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


def timed(runner: Runner) -> tuple[Clock, float]:
    """Trains; returns the clock and the last validation's accuracy in %."""
    clock = Clock()
    runner.register_hook(clock)
    runner.train()
    return clock, runner.message_hub.get_scalar("val/accuracy/top1").current()


def sizes(model: nn.Module) -> dict[str, int]:
    model.eval()
    masks = sum(p.numel() for name, p in model.named_parameters() if name.endswith("prune_mask"))
    return dict(
        macs=counted_macs(model, blank_example(model, (32, 32))),
        params=sum(p.numel() for p in model.parameters()) - masks,
    )


def write(out: str, result: dict) -> None:
    text = json.dumps(result, indent=1)
    (Path(out) / "result.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def train(args: argparse.Namespace) -> None:
    cfg = configured(args, args.config)
    cfg.randomness = dict(seed=args.seed)
    if args.epochs:
        cfg.train_cfg.update(max_epochs=args.epochs, val_interval=args.epochs)
        cfg.param_scheduler = one_cycle(cfg, args.epochs)
    runner = build_runner(cfg)
    clock, accuracy = timed(runner)
    torch.save(runner.model.state_dict(), Path(args.out) / "weights.pth")
    write(
        args.out,
        dict(
            config=args.config,
            seed=args.seed,
            epochs=runner.epoch,
            iterations=runner.iter,
            accuracy=accuracy,
            **sizes(runner.model),
            cpu_seconds=clock.cpu,
            wall_seconds=clock.wall,
        ),
    )


def prune_to(model: nn.Module, ranking: str, ratio: float) -> tuple[nn.Module, int]:
    """The largest of Torch-Pruning's networks that keeps at most ``ratio`` of the MACs, and its own count of them."""
    import torch_pruning as tp

    example = blank_example(model, (32, 32))
    del example["data_samples"]
    limit = ratio * counted_macs(model, example)

    def pruned(share: float) -> nn.Module:
        small = copy.deepcopy(model).eval()
        outer = [
            module
            for name, module in small.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not INNER.fullmatch(name)
        ]
        tp.pruner.BasePruner(
            small,
            example,
            importance=tp.importance.MagnitudeImportance(p=1),
            global_pruning=ranking == "l1",
            pruning_ratio=share,
            ignored_layers=outer,
        ).step()
        return small

    # Above nine tenths a global ranking empties layers, which Torch-Pruning then leaves whole.
    low, high, best = 0.0, 0.9, pruned(0.9)
    if counted_macs(best, example) > limit:
        raise SystemExit(f"--ratio {ratio}: pruning between the convolutions of the blocks does not get there")
    for _ in range(9):
        middle = (low + high) / 2
        small = pruned(middle)
        if counted_macs(small, example) > limit:
            low = middle
        else:
            high, best = middle, small
    return best, int(tp.utils.count_ops_and_params(best, example)[0])


def step_cost(small: nn.Module, dense: nn.Module, batch: dict, optimizer: ConfigDict, rounds: int = 9) -> float:
    """CPU time of a training step of ``small`` over that of ``dense``: median of alternating rounds of 5 steps."""
    nets: list[Any] = [copy.deepcopy(net).train() for net in (small, dense)]
    wrappers = [build_optim_wrapper(net, copy.deepcopy(optimizer)) for net in nets]
    ratios = []
    for i in range(rounds + 1):
        seconds = []
        for net, wrapper in zip(nets, wrappers, strict=True):
            assert isinstance(wrapper, OptimWrapper)
            start = time.process_time()
            for _ in range(5):
                net.train_step(copy.copy(batch), wrapper)
            seconds.append(time.process_time() - start)
        if i:
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def prune(args: argparse.Namespace) -> None:
    first = json.loads((Path(args.dense) / "result.json").read_text(encoding="utf-8"))
    cfg = configured(args, first["config"])
    # Other batches than in the first phase, which began from the same seed.
    cfg.randomness = dict(seed=first["seed"] + 1000)
    cfg.optim_wrapper.optimizer.lr = args.lr
    total = args.epochs or args.seconds / first["cpu_seconds"] * first["epochs"]
    left = total - first["epochs"]
    if left <= 0:
        raise SystemExit(f"the dense phase took all of the time: {first['epochs']} of {total:.2f} dense epochs")

    # One runner to validate right after pruning; the second needs the pruned network's speed for its length.
    runner = build_runner(cfg)
    dense = runner.model
    dense.init_weights()  # marks it as initialised, so that the runner leaves the weights alone
    dense.load_state_dict(torch.load(Path(args.dense) / "weights.pth", weights_only=True))
    small, tp_macs = prune_to(dense, args.ranking, args.ratio)
    runner.model = small
    pruned_accuracy = runner.val()["accuracy/top1"]
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    cost = step_cost(small, dense, batch, cfg.optim_wrapper)
    iterations = round(left * first["iterations"] / first["epochs"] / cost)

    cfg.train_cfg = dict(by_epoch=False, max_iters=iterations, val_interval=iterations)
    cfg.param_scheduler = one_cycle(cfg, iterations, by_epoch=False, peak=args.lr)
    cfg.log_processor = dict(by_epoch=False)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=iterations, by_epoch=False)
    cfg.experiment_name = f"fine_tune_{args.ranking}"  # keeps its log apart from the first runner's
    runner = build_runner(cfg)
    runner.model = small
    clock, accuracy = timed(runner)
    kept, whole = sizes(small), sizes(dense)
    write(
        args.out,
        dict(
            ranking=args.ranking,
            target=args.ratio,
            seed=first["seed"],
            lr_dense=load_config(first["config"]).param_scheduler[0].eta_max,
            lr_fine_tune=args.lr,
            accuracy_dense=first["accuracy"],
            accuracy_pruned=pruned_accuracy,
            accuracy=accuracy,
            ops_kept=kept["macs"] / whole["macs"],
            params_kept=kept["params"] / whole["params"],
            **kept,
            macs_by_torch_pruning=tp_macs,
            inner_channels=[m.out_channels for n, m in small.named_modules() if INNER.fullmatch(n)],
            epochs_dense=first["epochs"],
            iterations_fine_tune=iterations,
            step_cost=cost,
            cpu_seconds_dense=first["cpu_seconds"],
            cpu_seconds_fine_tune=clock.cpu,
            cpu_seconds=first["cpu_seconds"] + clock.cpu,
            wall_seconds=first["wall_seconds"] + clock.wall,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("train", help="train a config against the clock")
    first.add_argument("config")
    first.add_argument("out", help="folder to write into")
    first.add_argument("--epochs", type=int, help="shortens a dense config: its one-cycle in so many epochs")
    first.add_argument("--seed", type=int, default=0)
    second = commands.add_parser("prune", help="prune by Torch-Pruning, fine-tune for the time left")
    second.add_argument("dense", help="folder of a dense network's 'train'")
    second.add_argument("out", help="folder to write into")
    second.add_argument("--ratio", type=float, required=True, help="of the multiplications, at most")
    second.add_argument("--ranking", choices=("l1", "uniform"), required=True)
    second.add_argument("--lr", type=float, default=0.1, help="peak of the fine-tuning cycle")
    time_limit = second.add_mutually_exclusive_group(required=True)
    time_limit.add_argument("--seconds", type=float, help="CPU seconds of both phases together")
    time_limit.add_argument("--epochs", type=float, help="or their worth in epochs of the dense network")
    for command in (first, second):
        command.add_argument("--data-root", help="folder of cifar-10-batches-py (default: the config's)")
        command.add_argument("--batches", type=int, help="batches an epoch, to try the script on cut data")
        command.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (train if args.command == "train" else prune)(args)


if __name__ == "__main__":
    main()
