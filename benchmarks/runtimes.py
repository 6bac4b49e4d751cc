"""Slimmed networks in the runtimes of small hardware: do their files compute the same, and is what was cut saved there?

    python benchmarks/runtimes.py [--only NETWORK ...] [--rounds 40] [--extras FOLDER]

Every network is written by ``mmitp export`` for one image, and run by torch (what is written, norms folded),
onnxruntime, OpenVINO and, through pnnx, ncnn: one thread, float32, in turn, processor time. A round's times are divided
by the dense network's in the same runtime and round. Noted are the median of these and the largest difference from
torch, in parts of an output's largest value; ``benchmarks/results/runtimes.json`` is the table in docs/deployment.md.
Detectors are cut off before boxes are decoded. What does not compute the same in a runtime has no figure there.

``pip install openvino ncnn pnnx``; with ``--target FOLDER`` they stay out of the environment, and ``--extras FOLDER``
finds them there. The CenterNets are trained and lie in configs/kitti/weights. The other networks have random weights;
their masks are drawn from one uniform distribution and frozen at half of the operations.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import draw_masks
from measured import origin  # first: see there
from mmengine import Config
from records import write_json

from mmitp.engine.checkpoint import load_fitting, read_checkpoint, weights_of_checkpoint
from mmitp.engine.config import build_model, load_config
from mmitp.engine.example import blank_example
from mmitp.engine.export import RawOutputs, export_checkpoint
from mmitp.pruning import MacBudget, fold_norms, freeze_masks, masked_layers, project, without_gathers
from mmitp.pruning.check import counted_macs
from mmitp.pruning.slim import slim_with_plan
from mmitp.pruning.verify import relative_gap, tensors_in

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "runtimes.json"
RUNTIMES = ("torch", "onnxruntime", "openvino", "ncnn")
#: A file that differs by more from torch does not compute the same.
TOLERANCE = 1e-3
WEIGHTS = "configs/kitti/weights"


@dataclass(frozen=True)
class Network:
    """One row: a file of a network.

    Attributes:
        name: of its group, whose first row is the dense network.
        row: what it is.
        config: path, or name of an OpenMMLab package's config.
        weights: checkpoint beside the config, or None: random weights and masks.
        shape: (H, W) in pixels.
        outputs: at which the file is cut off; all of them if empty.
        prune: ``model.prune`` of a network whose masks are drawn; None for the dense one.
        gathers: as ``export_checkpoint``'s.
    """

    name: str
    row: str
    config: str
    weights: str | None
    shape: tuple[int, int]
    outputs: tuple[str, ...] = ()
    prune: dict[str, Any] | None = None
    gathers: bool = False


def centernet(row: str, stem: str, gathers: bool = False) -> Network:
    maps = ("heatmap", "wh", "offset")
    files = f"{WEIGHTS}/{stem}.py", f"{WEIGHTS}/{stem}.pth"
    return Network("CenterNet-DLA34 x 0.25, 160x512", row, *files, (160, 512), maps, gathers=gathers)


def drawn(name: str, config: str, shape: tuple[int, int]) -> list[Network]:
    """A network of random weights: dense, with masks of single layers, and with masks tied over streams."""
    single, tied = "masks of single layers", "masks tied over streams"
    rows: list[tuple[str, dict[str, Any] | None, bool]] = [
        ("dense", None, False),
        (f"pruned to 0.5, {single}", {}, False),
        (f"pruned to 0.5, {single}, `--gather`", {}, True),
        (f"pruned to 0.5, {tied}", dict(share="stream"), False),
        (f"pruned to 0.5, {tied}, `--gather`", dict(share="stream"), True),
    ]
    size = f"{shape[0]}x{shape[1]}"
    return [
        Network(f"{name}, {size}", row, config, None, shape, prune=prune, gathers=gathers)
        for row, prune, gathers in rows
    ]


NETWORKS = [
    centernet("dense", "start_s0"),
    centernet("pruned to 0.5, `push='fisher'`", "started_prune50_fisher_s0"),
    centernet("pruned to 0.5, `push='fisher'`, `--gather`", "started_prune50_fisher_s0", gathers=True),
    centernet("control at 0.5 (`mmitp control`)", "start_uniform50_s0"),
    *drawn("RTMDet-tiny", "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", (320, 320)),
    *drawn("ResNet-50", "mmpretrain::resnet/resnet50_8xb32_in1k.py", (224, 224)),
]


def load(network: Network, folder: Path) -> tuple[Config, str]:
    """Its config and checkpoint; masks and weights that are drawn go to ``folder`` first."""
    if network.weights is not None:
        return load_config(str(ROOT / network.config)), str(ROOT / network.weights)
    base = folder / "base.py"
    base.write_text(f'_base_ = ["{network.config}"]\n', encoding="utf-8")
    cfg = load_config(str(base))
    if network.prune is not None:
        cfg.model.update(type="mmitp.MaskedModel", of=cfg.model.type, prune=network.prune)
    torch.manual_seed(0)
    model = build_model(cfg)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # nothing is 0 or 1 by chance
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    if masked_layers(model):
        budget = MacBudget(model.eval(), blank_example(model, network.shape))
        draw_masks(budget, "even")
        freeze_masks(model, budget.split(project(budget, 0.5, fill=True, divisor=8).pattern))
    checkpoint = folder / "weights.pth"
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    return cfg, str(checkpoint)


# -- the runtimes: each makes a function of the image batch out of a file


def onnxruntime_of(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def openvino_of(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    import openvino

    core = openvino.Core()
    settings = dict(INFERENCE_NUM_THREADS=1, INFERENCE_PRECISION_HINT="f32")
    model = core.compile_model(core.read_model(str(file)), "CPU", settings)

    def run(images: np.ndarray) -> list[np.ndarray]:
        got = model(images)
        return [got[i] for i in range(len(model.outputs))]

    return run


def ncnn_of(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """By pnnx; in float32 as the others, where ncnn would store halves.

    Raises:
        ValueError: ncnn does not load what pnnx makes.
    """
    import ncnn
    import onnx
    import pnnx

    program = Path(pnnx.__file__).parent / "pnnx"
    subprocess.run([program, file.name, "fp16=0"], cwd=file.parent, check=True, capture_output=True)
    net = ncnn.Net()
    net.opt.num_threads = 1
    for name in ("use_fp16_storage", "use_fp16_packed", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, name, False)
    if net.load_param(f"{file.with_suffix('')}.ncnn.param") or net.load_model(f"{file.with_suffix('')}.ncnn.bin"):
        raise ValueError("ncnn does not load it")
    count = len(onnx.load(str(file)).graph.output)

    def run(images: np.ndarray) -> list[np.ndarray]:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(images[0]).clone())
        return [np.array(extractor.extract(f"out{i}")[1])[None] for i in range(count)]

    return run


MAKERS = dict(onnxruntime=onnxruntime_of, openvino=openvino_of, ncnn=ncnn_of)


@dataclass
class Made:
    """A network's functions by runtime, what they differ from torch by, and its size."""

    run: dict[str, Callable[[np.ndarray], list[np.ndarray]]]
    gap: dict[str, float]
    macs: int


def make(network: Network, folder: Path) -> Made:
    """Exports a network, and loads the file in every runtime."""
    import onnx

    cfg, checkpoint = load(network, folder)
    file = folder / "net.onnx"
    print(export_checkpoint(cfg, checkpoint, str(file), network.shape, 1, gathers=network.gathers).text(), flush=True)
    if network.outputs:
        onnx.utils.extract_model(str(file), str(folder / "cut.onnx"), ["images"], list(network.outputs))
        file = folder / "cut.onnx"
    model = torch_model(cfg, checkpoint, network)
    example = blank_example(model, network.shape)
    macs = counted_macs(model, example)
    raw = RawOutputs(model, network.shape).eval()

    @torch.inference_mode()
    def run_torch(images: np.ndarray) -> list[np.ndarray]:
        return [t.numpy() for t in tensors_in(raw.raw(torch.from_numpy(images)))]

    made = Made({"torch": run_torch}, {}, macs)
    images = np.random.default_rng(0).standard_normal((1, 3, *network.shape)).astype(np.float32)
    expected = run_torch(images)
    for runtime, maker in MAKERS.items():
        try:
            run = maker(file)
            got = run(images)
        except (ValueError, RuntimeError) as error:
            print(f"{runtime}: {error}", flush=True)
            continue
        if [g.shape for g in got] != [e.shape for e in expected]:
            print(f"{runtime}: shapes {[g.shape for g in got]}, of torch {[e.shape for e in expected]}", flush=True)
            continue
        pairs = zip(map(torch.tensor, expected), map(torch.tensor, got), strict=True)
        gap = max(relative_gap(*pair) for pair in pairs)
        print(f"{runtime}: differs by {gap:.2g}", flush=True)
        if gap <= TOLERANCE:
            made.run[runtime], made.gap[runtime] = run, gap
    return made


def torch_model(cfg: Config, checkpoint: str, network: Network) -> torch.nn.Module:
    """What is written into the file."""
    model = build_model(cfg)
    load_fitting(model, weights_of_checkpoint(read_checkpoint(checkpoint, False), model), checkpoint, network.config)
    model.eval()
    example = blank_example(model, network.shape)
    if masked_layers(model):
        model, _ = slim_with_plan(model, example, MacBudget(model, example))
    model = fold_norms(model, example)
    return model if network.gathers else without_gathers(model, example)


def measure(networks: Sequence[Network], made: Sequence[Made], rounds: int) -> list[list[Any]]:
    """The rows of one group."""
    images = np.random.default_rng(0).standard_normal((1, 3, *networks[0].shape)).astype(np.float32)
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for n in range(rounds + 2):
        for runtime in RUNTIMES:
            for i, one in enumerate(made):
                if runtime in one.run:
                    start = time.process_time()
                    one.run[runtime](images)
                    if n >= 2:
                        times[i, runtime].append(1e3 * (time.process_time() - start))
    rows = []
    for i, (network, one) in enumerate(zip(networks, made, strict=True)):
        cells: list[Any] = []
        for runtime in RUNTIMES:
            if (i, runtime) not in times:
                cells.append(None)
                continue
            ratio = statistics.median(a / b for a, b in zip(times[i, runtime], times[0, runtime], strict=True))
            cells.append(f"{statistics.median(times[i, runtime]):.1f} ({ratio:.2f})")
        gap = max(one.gap.values())
        ops = round(one.macs / made[0].macs, 4)
        rows.append([network.name if i == 0 else "", network.row, ops, *cells, f"{gap:.0e}"])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NETWORK", help="groups whose names hold one of these")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--extras", help="folder that openvino, ncnn and pnnx were installed to")
    args = parser.parse_args()
    if args.extras:
        sys.path.append(args.extras)
    torch.set_num_threads(1)
    groups: dict[str, list[Network]] = defaultdict(list)
    for network in NETWORKS:
        if not args.only or any(word in network.name for word in args.only):
            groups[network.name].append(network)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: [make(network, Path(tempfile.mkdtemp(dir=folder))) for network in groups[name]] for name in groups
        }
        print("timing", flush=True)
        for name, networks in groups.items():
            rows += measure(networks, made[name], args.rounds)
    if args.only:
        return
    titles = ["network", "", "operations", "torch", "onnxruntime", "OpenVINO", "ncnn", "largest difference"]
    columns: list[dict[str, Any]] = [{"title": title} for title in titles]
    columns[2]["decimals"] = 3
    about = origin()
    about["versions"].update({name: version(name) for name in ("onnxruntime", "openvino", "ncnn", "pnnx")})
    content = dict(about, columns=columns, rows=rows)
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
