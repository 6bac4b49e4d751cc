"""Trains and prunes in one run with Only-Train-Once 3.0.1 (HESSO), in the time of the dense network's epochs.

    python benchmarks/oto_cifar.py configs/cifar10/resnet20_cifar10_short.py --ratio 0.3 --seed 0 --work-dir OUT/oto

``pip install --no-deps only-train-once==3.0.1``, and graphviz, pydot and onnx, into an environment of its own. Data,
augmentation, batch size, decay and the one-cycle of learning rate and momentum are the config's; HESSO with its SGD
variant is the optimizer, with the proportions of its authors' CIFAR-10 tutorial: pruning begins after a tenth of the
run and is spread in 10 periods over the next tenth. The whole network is trained to the end with zeros in it, and cut
then; the cut network is what is validated.

HESSO's own target is a share of channels. To bring it to ``--ratio`` of the operations, the number of channels of each
period is set to the fewest, in HESSO's own order of importance, that put the operations on a straight path from 1 to
the ratio. The residual streams stay whole, as in torch_pruning_cifar.py: its graph takes the streams of 16, 32 and 64
channels, joined by the zero-padded shortcuts, for one group of channels.

How many epochs the time of the config's dense ones is worth is measured at the start: steps under HESSO, zeros in
place, in turn with plain ones. HESSO's state is in no checkpoint, so a stopped run begins anew.

Three things are set right from outside, because the package (idle since 2024) does not run here as it is: it imports
parts of torch.onnx under the names of torch 2.0 to 2.5, it calls ``.cuda()`` on every mask, and it leaves the momentum
where it was when a scheduler moves it.
"""

import argparse
import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import measured  # first: makes the stack below importable without compiled operators
import torch
from mmengine import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmitp.pruning.check import counted_macs

PERIODS = 10
#: of the run: where pruning begins, and how long it goes on
BEGIN = LENGTH = 0.1


def import_oto() -> Any:
    """Only-Train-Once, with what it looks for in torch put where it looks for it."""
    try:
        importlib.import_module("torch.onnx._globals")
    except ModuleNotFoundError:
        exporter = "torch.onnx._internal.torchscript_exporter"
        sys.modules["torch.onnx._globals"] = importlib.import_module(f"{exporter}._globals")
        onnx: Any = torch.onnx
        onnx._optimize_graph = importlib.import_module(f"{exporter}.utils")._optimize_graph
    if not torch.cuda.is_available():
        tensor: Any = Tensor
        tensor.cuda = lambda self, *args, **kwargs: self
    return importlib.import_module("only_train_once").OTO


class Logits(nn.Module):
    """The classifier as a function of one tensor, which is what the package traces."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone, self.fc = classifier.backbone, classifier.head.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[0].mean((2, 3)))


def traced(classifier: nn.Module) -> Any:
    """The package's view of the network, its streams left whole."""
    logits = Logits(classifier)
    oto = import_oto()(model=logits, dummy_input=torch.zeros(1, 3, *measured.SHAPE))
    oto.mark_unprunable_by_param_names([name for name, _ in logits.named_parameters() if name.endswith("bn2.weight")])
    return oto


def hesso(oto: Any, cfg: Config, ratio: float, start: int, steps: int) -> torch.optim.Optimizer:
    """HESSO after the config's SGD, whose groups go by operations."""
    sgd = cfg.optim_wrapper.optimizer
    optimizer = oto.hesso(
        variant="sgd",
        lr=sgd.lr,
        first_momentum=sgd.momentum,
        dampening=0.0,
        weight_decay=sgd.weight_decay,
        target_group_sparsity=0.999,  # an upper limit: count_by_operations decides
        start_pruning_step=start,
        pruning_steps=steps,
        pruning_periods=PERIODS,
    )
    # what mmengine's momentum schedulers move
    optimizer.defaults["momentum"] = sgd.momentum
    for group in optimizer.param_groups:
        group["momentum"] = sgd.momentum

    def take_momentum(*_: Any) -> None:
        for group in optimizer.param_groups:
            group["first_momentum"] = group["momentum"]

    optimizer.register_step_pre_hook(take_momentum)
    count_by_operations(optimizer, oto._model, ratio)
    return optimizer


def count_by_operations(optimizer: Any, model: nn.Module, ratio: float) -> None:
    """Sets how many channels each period takes, right before HESSO picks them."""
    example = torch.zeros(1, 3, *measured.SHAPE)
    dense = counted_macs(model, example)
    price = channel_prices(model, example)
    pick = optimizer.identify_redundant_groups

    def identify() -> None:
        period = optimizer.curr_pruning_period
        limit = dense * (1 - (1 - ratio) * (period + 1) / PERIODS)
        groups = [g for g in optimizer.param_groups if g["is_prunable"] and not g["is_auxiliary"]]
        widths = [g["num_groups"] for g in groups]
        prices = [price[conv_of(g)] for g in groups]
        owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(widths))
        scores, taken = torch.cat(optimizer.global_scores), optimizer.pruned_group_idxes
        count = 0
        while True:  # as HESSO picks: of its lowest scores those that are not taken yet, by number
            lowest = set(torch.topk(-scores, len(taken) + count).indices.tolist()) - set(taken)
            gone = torch.bincount(owner[[*taken, *sorted(lowest)[:count]]], minlength=len(groups)).tolist()
            if kept_macs(dense, prices, widths, gone) <= limit or len(taken) + count == len(owner):
                break
            count += 1
        optimizer.active_num_redundant_groups[period] = count
        optimizer.target_num_redundant_groups = len(taken) + count + 1  # not reached before the last period is over
        pick()

    optimizer.identify_redundant_groups = identify


def kept_macs(dense: int, prices: list[int], widths: list[int], gone: list[int]) -> int:
    """Operations left; HESSO leaves every layer a channel."""
    return dense - sum(p * min(g, w - 1) for p, w, g in zip(prices, widths, gone, strict=True))


def conv_of(group: dict[str, Any]) -> str:
    """The convolution whose output channels a group of a block's inner channels is."""
    return next(name.removesuffix(".weight") for name in group["p_names"] if name.endswith("conv1.weight"))


def channel_prices(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Of every block's first convolution: operations that go with one output channel, the reader's included."""
    prices: dict[str, int] = {}
    areas: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda module, args, out: areas.update({name: out.shape[2] * out.shape[3]})

    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [module.register_forward_hook(note(name)) for name, module in convolutions.items()]
    with torch.no_grad():
        model.eval()(example)
    for handle in handles:
        handle.remove()
    for name, conv in convolutions.items():
        if name.endswith(".conv1") and ".layer" in name:
            reader = name.removesuffix("1") + "2"
            prices[name] = (
                areas[name] * conv.weight[0].numel() + areas[reader] * convolutions[reader].weight[:, 0].numel()
            )
    return prices


def cost_of_step(cfg: Config, ratio: float) -> dict[str, float]:
    """Processor time of a step under HESSO with its zeros in place, over a plain one."""
    nets = [MODELS.build(measured.dense_model(cfg)).train() for _ in "ab"]
    optimizer = hesso(traced(nets[0]), cfg, ratio, start=0, steps=PERIODS)
    wrappers = [OptimWrapper(optimizer), measured.build_optim_wrapper(nets[1], copy.deepcopy(cfg.optim_wrapper))]
    batch = measured.first_batch(cfg)
    for _ in range(PERIODS + 2):
        nets[0].train().train_step(copy.copy(batch), wrappers[0])
    return measured.paired_steps(nets, wrappers, batch)


def remove_checkpoints(folder: Path) -> None:
    """Of a stopped run, whose folder also holds the sweep's log and lock."""
    for path in (*folder.glob("*.pth"), folder / "last_checkpoint"):
        path.unlink(missing_ok=True)


def train(args: argparse.Namespace) -> None:
    cfg = measured.configured(args, args.config)
    remove_checkpoints(Path(cfg.work_dir))
    cfg.resume = False
    head = measured.head_of(args, cfg, args.config)
    path = measured.metrics_file(args, cfg)
    torch.manual_seed(args.seed)
    cost = cost_of_step(cfg, args.ratio)
    dense_epochs = cfg.train_cfg.max_epochs
    epochs = max(round(dense_epochs / cost["median"]), 1)
    measured.stretch(cfg, epochs)
    model = MODELS.build(measured.dense_model(cfg))
    oto = traced(model)
    updates = epochs * len(Runner.build_dataloader(cfg.train_dataloader, seed=0))
    if args.batches:
        updates = epochs * args.batches
    start, steps = round(BEGIN * updates), max(round(LENGTH * updates), PERIODS)
    optimizer = hesso(oto, cfg, args.ratio, start, steps)
    widths: list[int] = []
    whole: list[float] = []

    def cut(runner: Runner) -> nn.Module:
        whole.append(runner.message_hub.get_scalar("val/accuracy/top1").current())
        oto.construct_subnet(out_dir=cfg.work_dir)  # cuts the model itself, and saves it twice
        widths.extend(m.out_channels for n, m in model.named_modules() if n.endswith(".conv1") and ".layer" in n)
        return model

    head.update(
        step_cost=cost, relative_cost=round(epochs * cost["median"] / dense_epochs, 4), target_ratio=args.ratio,
        pruning_starts=start, pruning_steps=steps, pruning_periods=PERIODS,
    )  # fmt: skip
    result = measured.measured_run(cfg, path, head, model, OptimWrapper(optimizer), cut)
    measured.finish(path, result, accuracy_before_cut=round(whole[0], 2), inner_widths=widths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--ratio", type=float, required=True, help="of the multiplications, at most")
    measured.add_run_options(parser)
    torch.set_num_threads(1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
