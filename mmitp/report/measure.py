"""What a report measures itself: sizes of dense networks, latency of dense and slimmed ones, sample detections."""

from __future__ import annotations

import base64
import copy
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmitp.engine.checkpoint import known_input, read_checkpoint
from mmitp.engine.config import enter_scope
from mmitp.engine.data_paths import check_data
from mmitp.engine.example import blank_example
from mmitp.engine.robust_eval import EvalAttack, attacked, build_test_runner
from mmitp.models.slim_config import drop_pretrained, is_masked
from mmitp.pruning.check import counted_macs
from mmitp.pruning.latency import paired_times, processor
from mmitp.report.read import RunRecord

__all__ = ["Sample", "Sizes", "Timing", "deployed_model", "input_shape", "sample_detections", "sizes_of", "time_run"]

#: height and width in pixels
Shape = tuple[int, int]


@dataclass
class Sizes:
    """Operations at an input of ``shape`` and parameters, dense and kept; None where they are not known."""

    macs_dense: int | None = None
    macs_kept: int | None = None
    params_dense: int | None = None
    params_kept: int | None = None
    shape: Shape | None = None


@dataclass
class Timing:
    """Latency of one image, one thread: medians in ms, and quartiles of the paired ratios dense / slimmed.

    ``slimmed_ms`` and ``ratios`` are None for a dense run, ``dense_ms`` and ``ratios`` for one that is small from the
    start.
    """

    dense_ms: float | None
    slimmed_ms: float | None
    ratios: tuple[float, float, float] | None
    machine: str

    def speed_up(self) -> str:
        assert self.ratios is not None
        low, median, high = self.ratios
        return f"{median:.2f} ({low:.2f} to {high:.2f})"


@dataclass
class Sample:
    """A picture of ground truth and detections: a JPEG, in base64, and its title."""

    title: str
    jpeg: str


def input_shape(run: RunRecord, trust: bool = False) -> Shape | None:
    """(H, W) the run's operations are stated for: PruneHook's setting, else what the newest checkpoint knows."""
    if run.hook is not None and run.hook.get("input_shape"):
        height, width = run.hook.input_shape
        return int(height), int(width)
    if run.checkpoint is not None:
        return known_input(read_checkpoint(str(run.checkpoint), trust))[0]
    return None


def dense_model(cfg: Config) -> nn.Module:
    """The config's network without masks, with random weights."""
    enter_scope(cfg)
    model = copy.deepcopy(cfg.model)
    if is_masked(model):
        model.type = model.pop("of")
        model.pop("prune", None)
    if cfg.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", copy.deepcopy(cfg.data_preprocessor))
    drop_pretrained(model)
    return MODELS.build(model).eval()


def deployed_model(run: RunRecord) -> nn.Module:
    """What the run leaves to deploy, with random weights: the slimmed network where there is one, else the dense."""
    return dense_model(run.cfg if run.slim_config is None else Config.fromfile(str(run.slim_config)))


def sizes_of(run: RunRecord, shape: Shape | None, own: Shape | None = None) -> Sizes:
    """Of a frozen run what the freeze noted, of another what is counted on an image of ``shape``.

    A frozen run is counted anew for another size than its ``own``, if its slimmed network is there.
    """
    if run.frozen is not None:
        noted = {key: run.frozen.get(key) for key in ("macs_dense", "macs_kept", "params_dense", "params_kept")}
        if shape is not None and own not in (None, shape) and run.slim_config is not None:
            for key, network in (("macs_dense", dense_model(run.cfg)), ("macs_kept", deployed_model(run))):
                noted[key] = counted_macs(network, blank_example(network, shape))
            own = shape
        return Sizes(**noted, shape=own or shape)
    model = dense_model(run.cfg)
    params = sum(p.numel() for p in model.parameters())
    macs = counted_macs(model, blank_example(model, shape)) if shape else None
    if run.small:  # how large the dense network is, its config does not say
        return Sizes(macs_kept=macs, params_kept=params, shape=shape)
    return Sizes(macs, None if run.pruned else macs, params, None if run.pruned else params, shape)


def time_run(run: RunRecord, shape: Shape, rounds: int | None = None) -> Timing:
    """Times the run's dense network and, beside it, its slimmed one where there is one."""
    models = [dense_model(run.cfg)]
    if run.slim_config is not None:
        models.append(deployed_model(run))
    times = paired_times(models, blank_example(models[0], shape), rounds=rounds) / 1e6
    dense = float(times[:, 0].quantile(0.5))
    if run.small:
        return Timing(None, dense, None, processor("cpu"))
    if len(models) == 1:
        return Timing(dense, None, None, processor("cpu"))
    ratios: Tensor = (times[:, 0] / times[:, 1]).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=times.dtype))
    low, median, high = ratios.tolist()
    return Timing(dense, float(times[:, 1].quantile(0.5)), (low, median, high), processor("cpu"))


def sample_detections(
    run: RunRecord, count: int, trust: bool = False, attack: EvalAttack | None = None, eps: float = 0.0
) -> Sample | str:
    """A picture of ``count`` test images, ground truth beside the network's detections; or why there is none.

    The images are spread evenly over the test set. The detections are the slimmed network's where its weights are
    there, else the newest checkpoint's.

    Args:
        run: of a detector.
        count: number of images at most.
        trust: whether a checkpoint may run code.
        attack: the detections are those on attacked images; the images drawn are the clean ones.
        eps: size of the attack, pixels/255.
    """
    import cv2

    from mmitp.visualization import save_gt_vs_pred

    source = run.slim_config if run.slim_config is not None and run.slim_weights is not None else None
    weights = run.slim_weights if source is not None else run.checkpoint
    if weights is None:
        return "no checkpoint is there"
    cfg = Config.fromfile(str(source)) if source is not None else copy.deepcopy(run.cfg)
    if not cfg.get("test_dataloader"):
        return "the config has no test_dataloader"
    cfg.load_from, cfg.log_level = str(weights), "WARNING"
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    with tempfile.TemporaryDirectory(prefix="mmitp_report_") as folder:
        cfg.work_dir = folder
        cfg.visualizer = dict(type="Visualizer", vis_backends=[])
        cfg.experiment_name = Path(folder).name
        try:
            check_data(cfg, ("test_dataloader", "test_evaluator"))
            runner = build_test_runner(cfg, trust=trust)
            if not hasattr(runner.model, "add_pred_to_datasample"):
                return "it is no detector"
            runner.call_hook("before_run")
            runner.load_or_resume()
            dataset = runner.test_loop.dataloader.dataset
            chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().unique().tolist()
            runner.model.eval()
            under = attacked(runner.model, attack, eps, dataset) if attack is not None else nullcontext()
            with torch.no_grad(), under:
                results = [runner.model.test_step(_batch(dataset[i]))[0] for i in chosen]
            picture = save_gt_vs_pred(dataset, results, Path(folder) / "samples.png", n=len(results))
        except (ValueError, OSError, ImportError, KeyError) as error:  # what a test set or its metric lacks
            return str(error).splitlines()[0]
        image = cv2.imread(str(picture))
        assert image is not None, "it was written just now"
        if image.shape[1] > 1200:
            image = cv2.resize(image, (1200, image.shape[0] * 1200 // image.shape[1]), interpolation=cv2.INTER_AREA)
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])
    network = "slimmed network" if source is not None else "network of the newest checkpoint"
    return Sample(f"{network} ({weights.name})", base64.b64encode(jpeg.tobytes()).decode("ascii"))


def _batch(item: dict) -> dict:
    return {key: [value] for key, value in item.items()}
