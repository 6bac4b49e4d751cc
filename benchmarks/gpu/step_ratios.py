"""What a step costs on a card: masked, attacked and slimmed over dense, in training and inference, by kind of launch.

    python benchmarks/gpu/step_ratios.py [--minutes 2] [--parts resnet20 together ...]

A part for each network: training steps (dense; with masks in the pruning window; slimmed to half of the operations;
each of these under FastAT), then inference at batch 1 and 32 (dense; slimmed; Torch-Pruning's network where that
package is installed), as they are and captured in CUDA graphs. ``compiled_NET`` does the same through torch.compile,
which takes longer to compile than to measure. ``together`` is the CIFAR run's captured step with several runs on the
card at once. Steps of all variants take turns; a ratio is taken round by round, and its median and quartiles are
written down at once. What cannot be captured or compiled is named with its error.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import evidence  # first: makes the other scripts importable
from evidence import ROOT, Bench, Part

MINUTES = 2.0
TARGET, DIVISOR = 0.5, 16


class Net(NamedTuple):
    """A network and its sizes; ``toy`` are overrides of a dry run."""

    config: str
    shape: tuple[int, int]
    batch: int
    toy: dict[str, Any]
    toy_shape: tuple[int, int]


CENTERNET_TOY = {
    "model.backbone.width": 0.125,
    "model.neck.in_channels": (8, 16, 32, 64),
    "model.bbox_head.in_channels": 8,
    "model.bbox_head.feat_channels": 8,
}
RESNET_TOY = {"model.backbone.depth": 18, "model.head.in_channels": 512}
RTMDET_TOY = {
    "model.backbone.widen_factor": 0.125,
    "model.neck.in_channels": [32, 64, 128],
    "model.neck.out_channels": 32,
    "model.bbox_head.in_channels": 32,
    "model.bbox_head.feat_channels": 32,
}
NETS = dict(
    resnet20=Net("cifar10/resnet20_cifar10.py", (32, 32), 256, {"model.backbone.depth": 8}, (32, 32)),
    centernet_dla34=Net("kitti/centernet_dla34_kitti.py", (384, 1280), 16, CENTERNET_TOY, (64, 64)),
    resnet50=Net("imagenet/resnet50_imagenet.py", (224, 224), 64, RESNET_TOY, (32, 32)),
    rtmdet_tiny=Net("kitti/rtmdet_tiny_kitti.py", (384, 1280), 16, RTMDET_TOY, (64, 64)),
)


class Variants(NamedTuple):
    """The networks of one part on the device, and what of the operations each keeps."""

    training: dict[str, Any]
    inference: dict[str, Any]
    kept: dict[str, float]
    missing: dict[str, str]


def variants(bench: Bench, net: Net) -> Variants:
    """Dense, masked in the middle of its window, slimmed, and Torch-Pruning's."""
    import inference
    import torch
    from mmengine.registry import MODELS, init_default_scope

    from mmitp.engine.config import load_config
    from mmitp.models.slim_config import drop_pretrained
    from mmitp.pruning import mask_model

    cfg = load_config(str(ROOT / "configs" / net.config))
    shape, divisor = net.shape, DIVISOR
    if bench.dry:
        cfg.merge_from_dict(net.toy)
        shape, divisor = net.toy_shape, 1
    drop_pretrained(cfg.model)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = dict(copy.deepcopy(cfg.model))
    if "data_preprocessor" in cfg:
        model["data_preprocessor"] = copy.deepcopy(cfg.data_preprocessor)
    dense = MODELS.build(model)
    dense.init_weights()
    missing = {}
    small = inference.pruned(dense.eval(), shape, "stream", TARGET, "even")(divisor)
    nets = {"dense": dense, "slimmed": small}
    if find_spec("torch_pruning") is None:
        missing["torch_pruning"] = "not installed"
    else:
        try:
            nets["torch_pruning"] = inference.torch_pruning(dense, shape, TARGET, divisor)
        except Exception as error:  # it stops at networks that it cannot follow
            missing["torch_pruning"] = f"{type(error).__name__}: {error}"
    macs = {name: inference.macs_at(model, shape) for name, model in nets.items()}
    masked = mask_model(copy.deepcopy(dense))
    training = {
        name: copy.deepcopy(model) for name, model in (("dense", dense), ("masked", masked), ("slimmed", small))
    }
    kept = {name: round(value / macs["dense"], 4) for name, value in macs.items()}
    nets = {name: model.to(bench.device).eval() for name, model in nets.items()}
    training = {name: model.to(bench.device).train() for name, model in training.items()}
    return Variants(training, nets, kept, missing)


@dataclass
class Step:
    """What runs on the device, and may be captured, and what the host does after it."""

    device: Callable[[], None]
    host: Callable[[], None]

    def __call__(self) -> None:
        self.device()
        self.host()


def pass_by() -> None:
    """Nothing."""


def train_steps(bench: Bench, nets: dict[str, Any], net: Net) -> dict[str, Callable[[], None]]:
    """Whole steps on one batch that is on the device: plain, and under FastAT."""
    import torch

    from mmitp.attacks import attack_mode
    from mmitp.engine.attack import select_losses
    from mmitp.engine.hooks import AdversarialHook
    from mmitp.models.report import random_batch

    shape, size = (net.toy_shape, 2) if bench.dry else (net.shape, net.batch)
    raw = random_batch(nets["dense"], shape, size, torch.Generator().manual_seed(0))
    data = nets["dense"].data_preprocessor(raw, True)
    attack = AdversarialHook(eps=2, alpha=2.5)
    attack.scale = 1.0

    def step(model: Any, optimizer: torch.optim.Optimizer, attacked: bool) -> None:
        batch = dict(data, data_samples=copy.deepcopy(data["data_samples"]))  # some heads alter them
        if attacked:
            with attack_mode(model, batchnorm=attack.batchnorm, dropout=attack.dropout):
                batch = attack.perturb(model, batch)
        loss = select_losses(model(**batch, mode="loss"), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    steps: dict[str, Callable[[], None]] = {}
    for name, model in nets.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
        after: Callable[[], None] = pass_by
        if name == "masked":
            after = pruner_in_window(model, shape, optimizer).advance
        for attacked in (False, True):
            steps[name + (" attacked" if attacked else "")] = Step(partial(step, model, optimizer, attacked), after)
    return steps


def pruner_in_window(model: Any, shape: tuple[int, int], optimizer: Any) -> Any:
    """Optimizer 2 at every step, with masks around zero and the path where their ratio is."""
    import torch

    from mmitp.engine.example import blank_example
    from mmitp.pruning import InTrainPruner

    pruner = InTrainPruner(model, blank_example(model, shape), TARGET, steps=100_000, lr=1e-4)
    for layer in pruner.masks.values():
        torch.nn.init.normal_(layer.prune_mask, 0.5, 0.5)
    assert pruner.path is not None
    ratio = pruner.ratio()
    done = next((s for s in range(0, 100_000, 100) if pruner.path.wanted(s) <= ratio), 99_000)
    pruner.load_state_dict(dict(pruner.state_dict(), count=done, position=done))
    pruner.attach(optimizer, captured=True)
    pruner.active = True
    return pruner


def passes(bench: Bench, nets: dict[str, Any], shape: tuple[int, int], batch: int) -> dict[str, Callable[[], None]]:
    """Forward passes without gradients."""
    import torch

    x = torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(0)).to(bench.device)

    @torch.no_grad()
    def run(model: Any) -> None:
        model(x)

    return {name: partial(run, model) for name, model in nets.items()}


def graphed(
    bench: Bench, steps: dict[str, Callable[[], None]], errors: dict[str, str]
) -> dict[str, Callable[[], None]]:
    """Steps that are captured now; those that cannot be are left out and named."""
    import torch
    from graphed import WARM_UP, Graphed

    out: dict[str, Callable[[], None]] = {}
    stream = torch.cuda.Stream() if bench.device == "cuda" else None
    for name, step in steps.items():
        captured: Callable[[], None] = Graphed(step, enabled=bench.device == "cuda")
        if isinstance(step, Step):
            captured = Step(Graphed(step.device, enabled=bench.device == "cuda"), step.host)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP + 2):
                    captured()
            evidence.synchronize(bench.device)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:300]
            if "CUDA error" in str(error):
                raise
            continue
        out[name] = captured
    return out


def take_turns(
    bench: Bench, key: str, steps: dict[str, Callable[[], None]], seconds: float, dense: str = "dense"
) -> None:
    """Times steps in turns, for so many seconds at most, and notes them as ``key``."""
    from measured import spread_of

    if bench.known(key) or dense not in steps:
        return
    names = list(steps)
    for name in names:
        for _ in range(3 if not bench.dry else 1):
            steps[name]()
    evidence.synchronize(bench.device)
    times: dict[str, list[float]] = {name: [] for name in names}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 3 or (time.monotonic() < end and rounds < 50 and not bench.dry):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            start = time.perf_counter()
            steps[name]()
            evidence.synchronize(bench.device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    figures = {}
    for name in names:
        base = dense + " attacked" if name.endswith("attacked") and dense + " attacked" in steps else dense
        ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
        figures[name] = dict(ms=round(1e3 * sorted(times[name])[rounds // 2], 3), over=base, **spread_of(ratios))
        if name.endswith("attacked"):
            plain = [a / b for a, b in zip(times[name], times[name.removesuffix(" attacked")], strict=True)]
            figures[name]["over_plain"] = spread_of(plain)["median"]
    bench.note(**{key: figures})


def network(bench: Bench, net: Net) -> None:
    """A part: training and inference, as they are and captured."""
    shape, seconds = (net.toy_shape, 0.0) if bench.dry else (net.shape, 3.0)
    nets = variants(bench, net)
    errors: dict[str, str] = dict(nets.missing)
    bench.note(kept=nets.kept, shape=list(shape), batch=2 if bench.dry else net.batch)
    for batch in (1, 2 if bench.dry else 32):
        steps = passes(bench, nets.inference, shape, batch)
        take_turns(bench, f"inference, batch {batch}", steps, seconds)
        take_turns(bench, f"inference, batch {batch}, captured", graphed(bench, steps, errors), seconds)
    steps = train_steps(bench, nets.training, net)
    take_turns(bench, "training", steps, 2 * seconds)
    bench.note(peak_gib=evidence.peak_memory(bench.device))
    take_turns(bench, "training, captured", graphed(bench, steps, errors), 2 * seconds)
    bench.note(left_out=errors)


def compiled(bench: Bench, net: Net) -> None:
    """A part: the same through torch.compile, one variant at a time."""
    import torch

    shape, seconds = (net.toy_shape, 0.0) if bench.dry else (net.shape, 3.0)
    nets, errors = variants(bench, net), {}
    backend = "eager" if bench.dry else "inductor"
    for batch in (1, 2 if bench.dry else 32):
        faster = {name: torch.compile(model, backend=backend) for name, model in nets.inference.items()}
        try:
            take_turns(bench, f"inference, batch {batch}, compiled", passes(bench, faster, shape, batch), seconds)
        except Exception as error:
            errors[f"batch {batch}"] = f"{type(error).__name__}: {error}"[:300]
        bench.note(left_out=errors, kept=nets.kept)


def together(bench: Bench) -> None:
    """A part: captured steps a second of ResNet-20's CIFAR run (FastAT, masks at rest), with several on the card."""
    import torch
    from cifar_full import ROWS, shorten, stream_of
    from cifar_run import Data, Row, Run, config_of
    from toys import cifar10

    torch.backends.cudnn.benchmark = True
    spec = next(row for row in ROWS if row.name == "fastat_psi50")
    data = Data.load(cifar10(bench.out, bench.dry, images=4000)[0], bench.device)
    rates = {}
    for runs in (1, 2) if bench.dry else (1, 2, 4, 8):
        work = []
        for seed in range(runs):
            row = Row(spec.name, spec.config)
            cfg = config_of(row)
            if bench.dry:
                shorten(cfg)
            run = Run(row, seed, data, bench.device, bench.out / "together", cfg, bench.device == "cuda")
            evidence.synchronize(bench.device)  # it was built on another stream than it will run on
            work.append((run.work(), stream_of(bench.device)))
        rounds = 2 if bench.dry else 60
        for i in range(2 * rounds):
            if i == rounds:
                evidence.synchronize(bench.device)
                start = time.perf_counter()
            for steps, stream in work:
                with stream:
                    next(steps)
        evidence.synchronize(bench.device)
        rates[str(runs)] = round(runs * rounds / (time.perf_counter() - start), 1)
        bench.note(steps_per_second=rates)


PARTS = [
    Part("resnet20", partial(network, net=NETS["resnet20"]), 45),
    Part("centernet_dla34", partial(network, net=NETS["centernet_dla34"]), 60),
    Part("together", together, 30),
    Part("resnet50", partial(network, net=NETS["resnet50"]), 45),
    Part("rtmdet_tiny", partial(network, net=NETS["rtmdet_tiny"]), 60),
    *(Part(f"compiled_{name}", partial(compiled, net=net), 180) for name, net in NETS.items()),
]


def parts(args: argparse.Namespace) -> list[Part]:
    return PARTS


if __name__ == "__main__":
    evidence.main(__doc__, __file__, parts, MINUTES)
