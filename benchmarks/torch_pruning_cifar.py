"""Prune a trained network with Torch-Pruning 1.6.1 (``pip install -e ".[bench]"``) and fine-tune it, in a given time.

    python benchmarks/measured.py configs/cifar10/resnet20_cifar10_short.py --epochs 7 --work-dir OUT/dense
    python benchmarks/torch_pruning_cifar.py --ratio 0.5 --ranking l1 --epochs 10 --work-dir OUT/l1_50
        --dense-weights OUT/dense/weights.pth --dense-metrics OUT/dense/metrics.json

The first line is the rival's first phase: a dense config's own complete one-cycle, lr to the config's peak, in fewer
epochs. The second takes that network, prunes it in one shot to at most ``--ratio`` of the multiplications, and
fine-tunes by a second cycle from ``--lr`` for the time that is left; one dense phase serves every pruned network. Data,
augmentation, batch size, optimizer, momentum and decay are the config's in both phases. A fine-tuning that was stopped
goes on from its last checkpoint when the same command is given again. Without ``--dense-metrics`` the dense weights are
somebody else's, of ResNet-20, and all of the time is the fine-tuning's.

Rankings, by Torch-Pruning's importance of all weights that go with a channel, divided by the layer's mean:

- ``l1``: L1 norms; channels of all layers compete.
- ``uniform``: L1 norms; the same share of every layer, the smallest first.
- ``taylor``: weights times their gradients on ten batches (``TaylorImportance``); channels of all layers compete.

Both prune the channels between a block's two convolutions. The residual streams stay whole: Torch-Pruning 1.6.1 reads
the zero-padded shortcut as one that leaves channel numbers alone and would remove wrong ones, and a projection in its
place would be another network than ours. The largest share is taken that fits ``--ratio``.

``--epochs E`` is the time of all phases in epochs of the dense network. How many iterations of the pruned one the rest
is worth is measured at the start, in single steps of both in turn (median ratio of their processor time).
"""

import argparse
import copy
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import measured  # first: makes the stack below importable without compiled operators
import torch
from mmengine import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from mmitp.engine.example import blank_example
from mmitp.pruning.check import counted_macs

# The layers whose output channels go.
INNER = re.compile(r"backbone\.layer\d\.\d+\.conv1")
ROOT = Path(__file__).resolve().parent.parent
DENSE = "resnet20_cifar10_short"
#: batches that gradients are taken on
BATCHES = 10


def gradients(model: nn.Module, batches: Iterable[dict]) -> dict[str, torch.Tensor]:
    """Gradients of the training loss, summed over batches, with batch normalisation in eval mode."""
    model = copy.deepcopy(model).eval()
    for batch in batches:
        loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, training=True), mode="loss"))
        loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def prune_to(
    model: nn.Module, ranking: str, ratio: float, slopes: dict[str, torch.Tensor] | None = None
) -> tuple[nn.Module, int]:
    """The largest of Torch-Pruning's networks that keeps at most ``ratio`` of the MACs, and its own count of them.

    ``slopes``: the weights' gradients, which ``taylor`` ranks by.
    """
    import torch_pruning as tp

    example = blank_example(model, (32, 32))
    del example["data_samples"]
    limit = ratio * counted_macs(model, example)

    def pruned(share: float) -> nn.Module:
        small = copy.deepcopy(model).eval()
        for name, weight in small.named_parameters() if slopes else ():
            weight.grad = slopes[name].clone() if name in slopes else None
        outer = [
            module
            for name, module in small.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not INNER.fullmatch(name)
        ]
        tp.pruner.BasePruner(
            small,
            example,
            importance=tp.importance.TaylorImportance() if slopes else tp.importance.MagnitudeImportance(p=1),
            global_pruning=ranking != "uniform",
            pruning_ratio=share,
            ignored_layers=outer,
        ).step()
        small.zero_grad()
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


def first_phase(args: argparse.Namespace) -> dict[str, Any]:
    """What is known of the dense phase; of somebody else's weights that they took no time.

    Raises:
        SystemExit: another seed than the dense phase's.
    """
    if args.dense_metrics is None:
        return dict(config=DENSE, seed=args.seed or 0, epochs=0, train_seconds=0.0, wall_seconds=0.0)
    known = json.loads(Path(args.dense_metrics).read_text(encoding="utf-8"))
    if args.seed not in (None, known["seed"]):
        raise SystemExit(f"--seed {args.seed}: the dense phase in {args.dense_metrics} has seed {known['seed']}")
    return dict(known, epochs=known["epochs"][-1]["epoch"])


def prune(args: argparse.Namespace) -> None:
    first = first_phase(args)
    args.seed, dense_epochs = first["seed"], first["epochs"]
    left = args.epochs - dense_epochs
    if left <= 0:
        raise SystemExit(f"the dense phase took all of the time: {dense_epochs} of {args.epochs:g} dense epochs")
    cfg = measured.configured(args, str(ROOT / f"configs/cifar10/{first['config']}.py"))
    head = measured.head_of(args, cfg, first["config"])
    path = measured.metrics_file(args, cfg)
    # Other batches than in the first phase, which began from the same seed.
    cfg.randomness = dict(seed=args.seed + 1000)
    cfg.optim_wrapper.optimizer.lr = args.lr
    whole = cfg.train_cfg.max_epochs

    dense = MODELS.build(measured.dense_model(cfg))
    dense.init_weights()  # marks it as initialised, so that the runner leaves the weights alone
    weights = torch.load(args.dense_weights, weights_only=True)
    dense.load_state_dict(weights.get("state_dict", weights))
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=args.seed)
    slopes = gradients(dense, itertools.islice(loader, BATCHES)) if args.ranking == "taylor" else None
    small, tp_macs = prune_to(dense, args.ranking, args.ratio, slopes)
    epoch = len(loader)
    known = Path(cfg.work_dir) / "pruned.json"
    if not known.is_file():  # a resumed run keeps its length
        accuracies = {name: validated(cfg, name, net) for name, net in (("dense", dense), ("pruned", small))}
        cost = measured.step_cost(small, dense, measured.first_batch(cfg), cfg.optim_wrapper)
        measured.write_json(known, dict(accuracies, step_cost=cost))
    pruned = json.loads(known.read_text(encoding="utf-8"))
    cost = pruned["step_cost"]
    iterations = round(left * epoch / cost["median"])

    cfg.train_cfg = dict(by_epoch=False, max_iters=iterations, val_interval=iterations)
    cfg.param_scheduler = measured.one_cycle(cfg, iterations, by_epoch=False, peak=args.lr)
    cfg.log_processor = dict(by_epoch=False)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=300, by_epoch=False, max_keep_ckpts=2)
    head.update(
        ranking=args.ranking,
        lr_fine_tune=args.lr,
        epochs_dense=dense_epochs,
        accuracy_dense=round(pruned["dense"], 2),
        accuracy_pruned=round(pruned["pruned"], 2),
        macs_by_torch_pruning=tp_macs,
        inner_widths=[m.out_channels for n, m in small.named_modules() if INNER.fullmatch(n)],
        step_cost=cost,
    )
    result = measured.measured_run(cfg, path, head, small)
    done = dense_epochs + iterations * cost["median"] / epoch
    measured.finish(
        path,
        result,
        train_seconds=round(first["train_seconds"] + result["train_seconds"], 1),
        wall_seconds=round(first["wall_seconds"] + result["wall_seconds"], 1),
        relative_cost=round(done / whole, 4),
    )


def validated(cfg: Config, name: str, model: nn.Module) -> float:
    """Accuracy of a network, in percent, on the config's validation set."""
    cfg = copy.deepcopy(cfg)
    cfg.update(resume=False, experiment_name=name)
    runner = measured.build_runner(cfg)
    runner.model = copy.deepcopy(model)
    return runner.val()["accuracy/top1"]


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense-weights", required=True, help="weights of the dense network")
    parser.add_argument("--dense-metrics", help="its metrics file; left out where the weights are somebody else's")
    parser.add_argument("--ratio", type=float, required=True, help="of the multiplications, at most")
    parser.add_argument("--ranking", choices=("l1", "uniform", "taylor"), required=True)
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the fine-tuning cycle")
    parser.add_argument(
        "--epochs", type=float, required=True, help="time of all phases, in epochs of the dense network"
    )
    measured.add_run_options(parser)
    parser.set_defaults(seed=None)
    return parser


def main() -> None:
    torch.set_num_threads(1)
    prune(command_line().parse_args())


if __name__ == "__main__":
    main()
