"""Networks for other runtimes: ONNX, torch.export and TorchScript files, each checked against torch when written."""

from __future__ import annotations

import inspect
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine import Config
from torch import Tensor, nn

from mmitp.engine.checkpoint import known_input, load_fitting, not_final, read_checkpoint, weights_of_checkpoint
from mmitp.engine.config import build_model, require_keys
from mmitp.engine.example import blank_example, image_channels
from mmitp.engine.hooks.prune_hook import STATE_KEY
from mmitp.engine.results import keep_inputs
from mmitp.files import write_whole
from mmitp.pruning import MacBudget, SlimPlan, apply_plan, fold_norms, masked_layers, without_gathers
from mmitp.pruning.check import counted_macs
from mmitp.pruning.progressive import restore_cut
from mmitp.pruning.slim import slim_with_plan
from mmitp.pruning.verify import relative_gap, tensors_in

#: Largest difference from torch that an exported file may show, in parts of an output's largest value.
TOLERANCE = 1e-4

# The first with grid_sample, which deformable convolutions are exported as, is 16; 17 is read by onnxruntime >= 1.12.
_OPSET = 17


class RawOutputs(nn.Module):
    """An OpenMMLab model as a function of the normalised image batch, with its outputs as a flat tuple.

    Classifiers give ``logits``; CenterNet ``heatmap`` (after the sigmoid), ``wh`` and ``offset`` (in cells), and
    decoded from them ``boxes`` (N, k, 5: x1, y1, x2, y2 in input pixels, score) and ``labels`` (N, k). Other
    single-stage detectors give what their head gives, as ``output_0`` on.

    Args:
        model: unwrapped model.
        shape: (H, W) of the images in pixels.
        channels: of the images; by default :func:`mmitp.engine.example.image_channels`.

    Attributes:
        names: of the outputs.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int], channels: int | None = None) -> None:
        super().__init__()
        self.model, self.shape = model, shape
        self.channels = image_channels(model, shape) if channels is None else channels
        try:
            with torch.no_grad():
                count = len(list(tensors_in(self.raw(torch.zeros(1, self.channels, *shape)))))
        except Exception as error:  # a model's code may miss what it is not given anywhere
            said = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{type(model).__name__} does not run on images alone ({said}, at {shape[0]}x{shape[1]}): two-stage "
                "detectors cannot be exported, nor others whose forward pass reads data samples (DETR and its like); "
                "and some networks take images of certain sizes only (--shape)"
            ) from error
        self.decodes = hasattr(getattr(model, "bbox_head", None), "heatmap_head")
        if self.decodes:
            self.names = ["heatmap", "wh", "offset", "boxes", "labels"]
        elif not hasattr(model, "add_pred_to_datasample") and count == 1:
            self.names = ["logits"]
        else:
            self.names = [f"output_{i}" for i in range(count)]

    def raw(self, images: Tensor) -> Any:
        return self.model(images, None, mode="tensor")

    def decode(self, heatmap: Tensor, wh: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """CenterNet's ``boxes`` and ``labels`` from its three maps."""
        head: Any = self.model.bbox_head
        cfg = head.test_cfg
        boxes, labels = head._decode_heatmap(
            heatmap, wh, offset, self.shape, k=cfg["topk"], kernel=cfg["local_maximum_kernel"]
        )
        return boxes, labels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(tensors_in(self.raw(images)))
        return (*outputs, *self.decode(*outputs)) if self.decodes else outputs


@dataclass
class ExportReport:
    """What :func:`export_checkpoint` wrote."""

    file: str
    size: int
    parameters: int
    how: str
    shape: tuple[int, int]
    batch: int | None
    outputs: list[str]
    difference: float
    warning: str = ""
    channels: int = 3

    def text(self) -> str:
        height, width = self.shape
        return (
            f"{self.warning}exported: {self.how}\n"
            f"input: images (float32, {self.batch or 'any batch'} x {self.channels} x {height} x {width}, normalised); "
            f"outputs: {', '.join(self.outputs)}\n"
            f"differs from torch by at most {self.difference:.2g} of an output's largest value\n"
            f"{self.file}: {self.size:,} bytes, {self.parameters:,} parameters"
        )


def export_checkpoint(
    cfg: Config,
    checkpoint: str,
    out: str,
    shape: Sequence[int] | None = None,
    batch: int | None = None,
    trust: bool = False,
    gathers: bool = False,
) -> ExportReport:
    """Exports a dense, masked or slimmed network and checks the file against torch.

    Masked networks are slimmed on the way. The input is the batch after the data preprocessor, whose settings (mean,
    std, channel order, padding) an ONNX file carries in its metadata as JSON under ``preprocessing``.

    Args:
        cfg: the config the checkpoint belongs to; a slimmed network's own config for a slimmed one.
        checkpoint: its path.
        out: file to write: ``.onnx``, ``.pt2`` (torch.export) or ``.pt`` (TorchScript by tracing).
        shape: (H, W) in pixels of the input; by default that of the training's budget.
        batch: fixed batch size; by default any.
        trust: also read a checkpoint that may run code.
        gathers: keep a slimmed network's gathers and scatters. By default products of zeros and ones take their place
            (:func:`mmitp.pruning.without_gathers`): more operations in about as much time, and right in runtimes that
            cannot gather.

    Raises:
        ValueError: the ending is none of these, the file is the checkpoint itself, the packages for ONNX are missing,
            the checkpoint does not fit, no shape is known, or the network cannot be exported that way.
        RuntimeError: the file would not compute what torch does; it is not written then.
        OSError: it cannot be written, for want of space and the like; nothing is left behind.
    """
    writers = {".onnx": _onnx, ".pt2": _exported, ".pt": _traced}
    ending = os.path.splitext(out)[1]
    if ending not in writers:
        raise ValueError(f"{out}: the ending says what to write: {', '.join(writers)}")
    keep_inputs(out, cfg.filename, checkpoint)
    require_keys(cfg, ["model"], "to export")
    loaded = read_checkpoint(checkpoint, trust)
    trained, channels = known_input(loaded)
    size = tuple(shape) if shape else trained
    if size is None:
        raise ValueError(f"{checkpoint} does not say which input size it is for: give --shape H W")
    height, width = int(size[0]), int(size[1])
    model = build_model(cfg)
    state, known = weights_of_checkpoint(loaded, model), loaded.get(STATE_KEY, {})
    example, budget = blank_example(model, (height, width), channels), None
    if masked_layers(model) and (slimmed := known.get("slimmed")):  # by slim_at_end
        apply_plan(model, SlimPlan.from_spec(slimmed["spec"]))
    elif masked_layers(model) and (cut := known.get("pruner", {}).get("cut")) is not None:  # progressively
        budget = MacBudget(model.eval(), example)
        apply_plan(model, restore_cut(model, budget, cut), keep_masks=True)
    load_fitting(model, state, checkpoint, cfg.filename)
    warning = not_final(model, checkpoint)
    model.eval()
    how = f"{cfg.model.get('of', cfg.model.type)} as it is"
    if masked_layers(model):
        budget = budget or MacBudget(model, example)
        model, _ = slim_with_plan(model, example, budget)
        how = f"{cfg.model.of}, slimmed: {budget.kept_macs():,} of {budget.dense_macs:,} MACs at {height}x{width}"
    network = RawOutputs(model, (height, width), channels).eval()
    written, problem = _for_runtimes(model, example, gathers)
    if problem:
        warning += f"warning: the file is not as quick as it could be: {problem}\n"
    if (added := counted_macs(written, example) - counted_macs(model, example)) > 0:
        how += f"; products in place of gathers add {added:,} MACs"
    try:
        content, run = writers[ending](RawOutputs(written, (height, width), channels).eval(), batch, cfg)
    except (RuntimeError, TypeError, NotImplementedError, torch.onnx.errors.OnnxExporterError) as error:
        raise ValueError(f"{how} cannot be exported as {ending}: {error}") from error
    difference = max(_difference(network, run, n) for n in ((batch,) if batch else (1, 3)))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{out} would differ from torch by {difference:.3g} of an output's largest value")
    write_whole(out, content)
    parameters = sum(p.numel() for p in model.parameters())
    return ExportReport(
        file=out,
        size=len(content),
        parameters=parameters,
        how=how,
        shape=(height, width),
        batch=batch,
        outputs=network.names,
        difference=difference,
        warning=warning,
        channels=network.channels,
    )


def _for_runtimes(model: nn.Module, example: Any, gathers: bool) -> tuple[nn.Module, str]:
    """The network with its norms folded, without gathers unless they are wanted, and what stood in the way of that.

    Exporters fold norms too, but for those that a scatter parts from their convolution.
    """
    problems = []
    for step in [fold_norms] if gathers else [fold_norms, without_gathers]:
        try:
            model = step(model, example)
        except RuntimeError as error:  # the file is right all the same
            problems.append(str(error))
    return model, "; ".join(problems)


def _example(network: RawOutputs, n: int) -> Tensor:
    return torch.randn(n, network.channels, *network.shape, generator=torch.Generator().manual_seed(n))


# Each makes the file's content, and what runs it: only what has been checked is written, and torch's own writer of
# TorchScript ends the whole process where the disk is full.
_Written = tuple[bytes, Callable[[Tensor], list[Tensor]]]


def _onnx(network: RawOutputs, batch: int | None, cfg: Config) -> _Written:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f'ONNX needs more packages ({error}): pip install -e ".[export]"') from error
    # The exporter by tracing: several times as fast as the one by torch.export, smaller files, no further packages.
    exporter: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    names = ["images", *network.names]
    buffer: Any = io.BytesIO()  # which the exporter by tracing takes, though its hints say otherwise
    with warnings.catch_warnings(), torch.no_grad():
        # Shape checks that tracing takes as constants; the check at other batch sizes would show where one is not.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (_example(network, batch or 2),),
            buffer,
            opset_version=_OPSET,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes=None if batch else {name: {0: "batch"} for name in names},
            **exporter,
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, dict(preprocessing=_preprocessing(cfg)))
    content = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its words on unused constants
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(o)) for o in session.run(None, {"images": images.numpy()})]

    return content, run


def _exported(network: RawOutputs, batch: int | None, cfg: Config) -> _Written:
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(network, (_example(network, batch or 2),), dynamic_shapes=shapes, strict=False)
    program.example_inputs = None  # they would be saved too
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda images: list(loaded(images))


def _traced(network: RawOutputs, batch: int | None, cfg: Config) -> _Written:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        # Two images: a batch of one would fix sizes that happen to be one.
        torch.jit.save(torch.jit.trace(network, _example(network, batch or 2), check_trace=False), buffer)
    loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))
    return buffer.getvalue(), lambda images: list(loaded(images))


def _preprocessing(cfg: Config) -> str:
    """What the input has to look like, as JSON."""
    settings = dict(cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {})
    settings.pop("type", None)
    return json.dumps(settings, default=str)


@torch.no_grad()
def _difference(network: RawOutputs, run: Callable[[Tensor], list[Tensor]], n: int) -> float:
    """Largest difference over the outputs for a batch of n, each in parts of its largest value."""
    images = _example(network, n)
    expected, got = list(network(images)), run(images)
    if network.decodes:
        # Peaks of almost the same height may change places: decoding is compared on the very same maps, and there for
        # peaks of a height of their own (where there is none, the rest are zeros in no order).
        expected[3:] = network.decode(*got[:3])
        scores = expected[3][..., 4]
        tie = scores[:, 1:] == scores[:, :-1]
        alone = scores > 0
        alone[:, 1:] &= ~tie
        alone[:, :-1] &= ~tie
        alone[:, -1] = False  # the next is unknown
        expected[3:], got[3:] = [t[alone] for t in expected[3:]], [t[alone] for t in got[3:]]
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape:
            raise RuntimeError(f"an exported output has shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        worst = max(worst, relative_gap(a, b))
    return worst
