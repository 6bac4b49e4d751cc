"""What mmitp prunes exactly: networks of torchvision, timm, Ultralytics, Hugging Face and OpenMMLab, one row each.

    python benchmarks/compatibility.py run [--only 'timm/*' ...] [--again] [--limit SECONDS] [--memory GIB]
    python benchmarks/compatibility.py table [--check]

``run`` builds each network with random weights in a process of its own, and does what ``prune_report --check`` does:
masks, random pattern at about half of the operations, freeze, slim. It notes whether the slimmed network gives what the
masked one gave (1e-5 of each output's largest value, at two sizes where the network takes two), and whether torch's
``FlopCounterMode`` counts the operations that the budget states. Weights that are constant at the start (biases at 0,
norms at 1, scales at 1e-6) are moved first: they would hide mistakes. Where convolutions alone leave more than half of
the operations, linear layers are masked too.

Rows are written to ``benchmarks/compatibility.json`` one by one; a run that was stopped goes on with those that are
missing, of the libraries that are installed. ``table`` makes ``docs/compatibility.md`` of them. timm, transformers and
ultralytics want an environment without ``.[mm]`` (``pip install -e ".[compat]"``); mmdet's and mmpretrain's rows are
measured in the project's own.
"""

from __future__ import annotations

import argparse
import collections
import copy
import fnmatch
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
RTOL = 1e-5

#: side of the square input in pixels where 64 does not do
SIDES = {
    "torchvision/alexnet": 96,
    "torchvision/googlenet": 96,
    "torchvision/inception_v3": 128,
    "torchvision/maxvit_t": 224,
    "torchvision/vit_*": 224,
    "torchvision/ssd300_vgg16": 300,
    "torchvision/ssdlite320*": 320,
    "torchvision/*rcnn*": 128,
    "torchvision/*_fpn*": 128,
    "ultralytics/*": 128,
    "transformers/*": 128,
    "mmdet/*": 128,
    "mmpretrain/vgg*": 224,
    "mmpretrain/*": 64,
}

#: the smallest ones of Ultralytics' families, by their configuration files
YOLOS = (
    "yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-cls", "yolov9t", "yolov10n",
    "yolo11n", "yolo11n-seg", "yolo11n-obb", "yolo12n", "yolo26n", "rtdetr-resnet50",
)  # fmt: skip
HUGGING_FACE = ("resnet50", "convnext_tiny", "detr_resnet50", "segformer_b0")
MM = (
    "mmdet::retinanet/retinanet_r50_fpn_1x_coco",
    "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
    "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco",
    "mmdet::yolox/yolox_s_8xb8-300e_coco",
    "mmdet::ssd/ssd300_coco",
    "mmdet::centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco",
    "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco",
    "mmdet::yolof/yolof_r50-c5_8xb8-1x_coco",
    "mmdet::atss/atss_r50_fpn_1x_coco",
    "mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco",
    "mmdet::detr/detr_r50_8xb2-150e_coco",
    "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
    "mmdet::reppoints/reppoints-moment_r50_fpn_1x_coco",
    "mmdet::tood/tood_r50_fpn_1x_coco",
    "mmdet::gfl/gfl_r50_fpn_1x_coco",
    "mmdet::vfnet/vfnet_r50_fpn_1x_coco",
    "mmdet::foveabox/fovea_r50_fpn_4xb4-1x_coco",
    "mmdet::fsaf/fsaf_r50_fpn_1x_coco",
    "mmdet::free_anchor/freeanchor_r50_fpn_1x_coco",
    "mmdet::ddod/ddod_r50_fpn_1x_coco",
    "mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco",
    "mmdet::yolact/yolact_r50_1xb8-55e_coco",
    "mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance",
    "mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco",
    "mmpretrain::resnet/resnet50_8xb32_in1k",
    "mmpretrain::vgg/vgg16bn_8xb32_in1k",
    "mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k",
    "mmpretrain::mobilenet_v3/mobilenet-v3-small_8xb128_in1k",
    "mmpretrain::resnext/resnext50-32x4d_8xb32_in1k",
    "mmpretrain::densenet/densenet121_4xb256_in1k",
    "mmpretrain::shufflenet_v2/shufflenet-v2-1x_16xb64_in1k",
    "mmpretrain::hrnet/hrnet-w18_4xb32_in1k",
    "mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k",
    "mmpretrain::regnet/regnetx-400mf_8xb128_in1k",
    "mmpretrain::res2net/res2net50-w14-s8_8xb32_in1k",
    "mmpretrain::repvgg/repvgg-A0_8xb32_in1k",
    "mmpretrain::seresnet/seresnet50_8xb32_in1k",
    "mmpretrain::cspnet/cspdarknet50_8xb32_in1k",
    "mmpretrain::poolformer/poolformer-s12_32xb128_in1k",
    "mmpretrain::resnest/resnest50_32xb64_in1k",
    "mmpretrain::van/van-tiny_8xb128_in1k",
    "mmpretrain::mobileone/mobileone-s0_8xb32_in1k",
    "mmpretrain::convmixer/convmixer-768-32_10xb64_in1k",
    "mmpretrain::efficientnet_v2/efficientnetv2-b0_8xb32_in1k",
    "mmpretrain::mobilevit/mobilevit-xxsmall_8xb128_in1k",
    "mmpretrain::vision_transformer/vit-base-p16_32xb128-mae_in1k",
    "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k",
    "mmpretrain::convnext/convnext-tiny_32xb128_in1k",
)

#: reasons as the table has them: a pattern of what the budget says, and the short form
SHORT = (
    (r"stem|reads the model's input", "stem"),
    (r"^grouped", "grouped"),
    (r"^linear", "linear"),
    (r"^frozen|does not train", "frozen"),
    (r"structure forbids", "its structure forbids it"),
    (r"did not run", "not run in evaluation"),
    (r"called as a function|functional", "called as a function"),
    (r"weight is also read|another module shares", "weight read elsewhere"),
    (r"never read", "output not read"),
)

#: by how much the budget exceeds the counter where products are of unusual kinds, derived by hand, and why
EXPLAINED = {
    "timm/csatv2": (
        64**2 * 3 * 8 * 2 - 14 * 2 * 7**2,
        "its cosine transform multiplies by a constant matrix in batched products, which the counter leaves out "
        "(196,608), and its 14 attentions are written as plain products, which it counts (1,372)",
    ),
    "timm/cait_xxs24_224": (
        24 * 2 * 2 * 2 * 16**2,
        "two linear layers in each of its 24 blocks mix the attentions of its heads, of which two of four are left on "
        "either side; the counter sees batched products in them (49,152)",
    ),
    "timm/mvitv2_tiny": (
        96 * (256 * 8 + 2 * 64 * (16 + 8) + 4 * 16 * (16 + 4 * 8) + 8 * 4 * (8 + 4)),
        "queries are multiplied by relative positions, which are parameters, in batched products that the counter "
        "leaves out (823,296)",
    ),
    "timm/naflexvit_base_patch16_siglip": (
        16 * 768,
        "the query of its pooling is a parameter, so that its product with 16 keys counts as one with a weight "
        "(12,288); the counter leaves attention out",
    ),
    "timm/samvit_base_patch16_224": (
        12 * 64 * (8 * 14**2 * (14 + 14) + 4 * 4**2 * (4 + 4)),
        "queries are multiplied by relative positions, as in MViT: 8 blocks in windows of 14x14, 4 on the whole 4x4 "
        "(34,111,488)",
    ),
    "timm/sequencer2d_s": (
        2 * 2 * 4 * (4 * 81 * 48 * (192 + 48) + 14 * 16 * 96 * (384 + 96)),
        "of an LSTM the counter sees nothing: two a block, in two directions, four gates each (224,870,400)",
    ),
    **dict.fromkeys(
        ("transformers/detr_resnet50", "mmdet/detr/detr_r50_8xb2-150e_coco"),
        (
            2 * 100**2 * 256 + 100 * 16 * 256,
            "the 100 object queries are parameters: what the first layer of the decoder attends with has no image in "
            "it yet, so that its products count as those with a weight (5,529,600); the counter leaves attention out",
        ),
    ),
}


INTRODUCTION = """# What it works on

Made by `python benchmarks/compatibility.py run` and `table` of [compatibility.json](../benchmarks/compatibility.json),
torch {torch}, mmitp commit {mmitp} (the last row's), one thread, random weights.

Masks are drawn at random to about half of the operations (half-way to the cheapest ratio where that is higher), frozen,
and cut out. Two-stage detectors of torchvision and MMDetection work on twenty proposals, and their MACs are stated for
these. SSDlite starts from larger weights than its own: with those, scores tie.

- **masked**: layers whose input channels can be removed, of all layers that are counted. "+ linear": linear layers are
  masked too (`linear=True`), because convolutions alone leave more than half of the operations.
- **left dense**: the other layers, by reason. *grouped*: no mask of its own, its groups go with their readers.
- **cheapest**: share of the operations if every masked layer keeps one input channel.
- **equal**: outputs of the slimmed network equal the masked one's to 1e-5 of each output's largest value, at two sizes
  or batches where the network takes two. *in float64*: float32's rounding reorders what the network sorts.
- **counter**: torch's `FlopCounterMode` counts in the slimmed network what the budget states, as an integer. Products
  of two activations (attention's) are no part of the budget; where they are, they are left out of the count too.
  *but for N*: by a number of operations that is accounted for below the table.
"""

# -- networks


def names() -> dict[str, list[str]]:
    """Networks by library; of timm the smallest of each family."""
    found: dict[str, list[str]] = {}
    try:
        import torchvision.models as tv

        classifiers, detectors = tv.list_models(module=tv), tv.list_models(module=tv.detection)
        found["torchvision"] = [f"torchvision/{name}" for name in (*classifiers, *detectors)]
    except ImportError:
        pass
    try:
        found["timm"] = [f"timm/{name}" for name in smallest_of_timm()]
    except ImportError:
        pass
    for library, models in (("ultralytics", YOLOS), ("transformers", HUGGING_FACE)):
        if importlib.util.find_spec(library) is not None:
            found[library] = [f"{library}/{name}" for name in models]
    try:
        import mmdet.models  # noqa: F401
        import mmpretrain.models  # noqa: F401
    except (ImportError, TypeError):  # the latter beside a transformers that mmpretrain does not know
        return found
    for name in MM:
        found.setdefault(name.split("::")[0], []).append(name.replace("::", "/", 1))
    return found


def smallest_of_timm() -> list[str]:
    """A small model of each of timm's modules: of those whose names say small, the one with the fewest parameters."""
    import timm
    import torch

    cache = ROOT / "work_dirs" / f"timm_{timm.__version__}.json"
    if cache.is_file():
        return json.loads(cache.read_text(encoding="utf-8"))
    small = ("atto", "femto", "pico", "nano", "xxs", "xxt", "xs", "tiny", "mini", "small", "_0", "_s", "_t", "18", "b0")
    best = []
    for family in timm.list_modules():
        models = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        sizes: dict[str, int] = {}
        for name in sorted(models, key=lambda name: next((i for i, w in enumerate(small) if w in name), len(small))):
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
            except Exception:  # not every model can be built on the meta device
                continue
            if sizes[name] < 6e6 or len(sizes) == 5:
                break
        if models:
            best.append(min(sizes, key=sizes.__getitem__) if sizes else models[0])
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps(best), encoding="utf-8")
    return best


def side_of(name: str) -> int | None:
    return next((side for pattern, side in SIDES.items() if fnmatch.fnmatch(name, pattern)), None)


def build(name: str) -> tuple[Any, list[Any], str]:
    """A network with random weights, its examples (the second of another size, or a larger batch), and their size."""
    import torch

    library, _, model = name.partition("/")
    side = side_of(name)
    net, wrap = globals()[f"_{library}"](model, side)
    if not isinstance(net, torch.nn.Module):
        net, side = net
    side = side or 64
    examples = [wrap(1, side, side)]
    for batch, height, width in ((2, side + 32, side + 64), (2, side, side)):
        example = wrap(batch, height, width)
        try:
            with torch.no_grad():
                _call(copy.deepcopy(net).eval(), example)
        except Exception:  # a network of one size, or of one image
            continue
        examples.append(example)
        break
    return net, examples, f"{side}x{side}"


def _call(net: Any, example: Any) -> Any:
    from mmitp.pruning.verify import call_model

    return call_model(net, example)


def _noise(batch: int, height: int, width: int) -> Any:
    import torch

    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def _torchvision(model: str, side: int | None) -> tuple[Any, Callable]:
    import torch
    import torchvision

    options: dict[str, Any] = {}
    if model in torchvision.models.list_models(module=torchvision.models.detection):
        plain_nms()
        options.update(weights_backbone=None)
        net = torchvision.models.get_model(model, weights=None, **options)
        if hasattr(net.transform, "min_size") and "ssd" not in model:
            net.transform.min_size, net.transform.max_size = (side,), 2 * (side or 128)
        if hasattr(net, "rpn"):  # its region pooling in plain torch takes minutes for a thousand proposals
            net.rpn._post_nms_top_n = dict(training=20, testing=20)
        if "ssdlite" in model:  # its own start (0.03) lets signals die out: scores tie, and NMS takes either
            for module in net.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return net, lambda batch, height, width: [list(_noise(batch, height, width))]
    if model in ("googlenet", "inception_v3"):
        options.update(init_weights=False)
    return torchvision.models.get_model(model, weights=None, **options), _noise


def plain_nms() -> None:
    """Non-maximum suppression in plain torch where torchvision's compiled one does not load."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0, 1, 1]])
    try:
        torchvision.ops.nms(boxes, boxes[:, 0], 0.5)
    except (RuntimeError, NotImplementedError):
        from mmitp.ops.nms import nms

        torchvision.ops.boxes.nms = nms


def _timm(model: str, side: int | None) -> tuple[Any, Callable]:
    """At 64 pixels where the network takes them, else at the size that it was made for."""
    import timm
    import torch

    for options in (dict(img_size=side or 64), {}):
        try:
            net = timm.create_model(model, pretrained=False, **options)
        except Exception:  # most convolutional networks take no img_size, some none but their own
            continue
        own = int(net.default_cfg["input_size"][-1])
        for size in dict.fromkeys([*(options.values() or [side or 64]), 128, own]):
            try:
                with torch.no_grad():
                    copy.deepcopy(net).eval()(_noise(1, size, size))
                return (net, size), _noise
            except Exception:  # windows or strides that do not fit
                continue
    raise ValueError("timm builds it, but it runs at no size")


def _ultralytics(model: str, side: int | None) -> tuple[Any, Callable]:
    from ultralytics.nn import tasks

    kind = {"seg": "SegmentationModel", "pose": "PoseModel", "obb": "OBBModel", "cls": "ClassificationModel"}.get(
        model.split("-")[-1], "RTDETRDetectionModel" if model.startswith("rtdetr") else "DetectionModel"
    )
    return getattr(tasks, kind)(f"{model}.yaml", verbose=False), _noise


def _transformers(model: str, side: int | None) -> tuple[Any, Callable]:
    import transformers as hf

    if model == "resnet50":
        net = hf.ResNetForImageClassification(hf.ResNetConfig())
    elif model == "convnext_tiny":
        net = hf.ConvNextForImageClassification(hf.ConvNextConfig())
    elif model == "segformer_b0":
        net = hf.SegformerForSemanticSegmentation(hf.SegformerConfig())
    else:
        backbone = hf.ResNetConfig(out_features=["stage4"])
        net = hf.DetrForObjectDetection(
            hf.DetrConfig(
                use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone
            )
        )
    return net, lambda *shape: dict(pixel_values=_noise(*shape))


def _mm(name: str, side: int | None) -> tuple[Any, Callable]:
    from mmengine.registry import MODELS, init_default_scope

    from mmitp.engine.config import load_config
    from mmitp.engine.example import blank_example
    from mmitp.models.masked import MaskedModel  # noqa: F401  registers it
    from mmitp.models.slim_config import drop_pretrained

    cfg = load_config(name.replace("/", "::", 1))
    init_default_scope(cfg.get("default_scope") or "mmengine")
    model = copy.deepcopy(cfg.model)
    if cfg.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", copy.deepcopy(cfg.data_preprocessor))
    drop_pretrained(model)
    if "rpn" in (model.get("test_cfg") or {}):  # region pooling in plain torch takes minutes for a thousand proposals
        model.test_cfg.rpn.max_per_img = 20
    net = MODELS.build(model)
    for parameter in net.parameters():  # stages that a config freezes because it starts from ImageNet's weights
        parameter.requires_grad_(True)
    size = 300 if "ssd300" in name else 299 if "inception" in name else side
    return (net, size), lambda batch, height, width: blank_example(net, (height, width), batch=batch)


def _mmdet(model: str, side: int | None) -> tuple[Any, Callable]:
    return _mm(f"mmdet/{model}", side)


def _mmpretrain(model: str, side: int | None) -> tuple[Any, Callable]:
    fixed = any(word in model for word in ("vision_transformer", "swin", "mobilevit", "inception"))
    return _mm(f"mmpretrain/{model}", 224 if fixed else side)


# -- one network


def unsettle(net: Any) -> None:
    """Moves tensors that are constant at the start, and gives running statistics values of their own."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def noise(t: Any) -> Any:
        return torch.rand(t.shape, generator=generator).to(t)

    with torch.no_grad():
        for parameter in net.parameters():
            if (
                parameter.numel()
                and parameter.is_floating_point()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                start = float(parameter.flatten()[0])
                parameter.copy_((0.2 * noise(parameter) - 0.1) if abs(start) < 1e-8 else 0.8 + 0.4 * noise(parameter))
        for module in net.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.running_mean.copy_(0.2 * noise(module.running_mean) - 0.1)
                module.running_var.copy_(0.8 + 0.4 * noise(module.running_var))


def measure(name: str) -> dict[str, Any]:
    """The row of one network."""
    import mmitp  # noqa: F401  isort: skip
    import torch

    from mmitp.pruning import MacBudget, mask_model, masked_layers
    from mmitp.pruning.check import randomize_to
    from mmitp.pruning.freeze import freeze_masks
    from mmitp.pruning.report import dense_reason
    from mmitp.pruning.slim import slim_with_plan
    from mmitp.pruning.verify import difference, difference_in_double

    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, examples, size = build(name)
    net.eval()
    unsettle(net)
    row: dict[str, Any] = dict(input=size, parameters=sum(p.numel() for p in net.parameters()))
    first, *more = examples
    row["second_size"] = bool(more)
    budget, linear = None, False
    for linear in (False, True):
        masked = copy.deepcopy(net)
        try:
            mask_model(masked, linear=linear, example_inputs=first)
        except ValueError as error:
            if linear:
                return dict(row, outcome="nothing to mask", problem=str(error))
            continue
        budget = MacBudget(masked, first, more_examples=more)
        if budget.masked and budget.min_ratio() <= 0.5:
            break
    del net
    assert budget is not None
    reasons: collections.Counter[str] = collections.Counter()
    for record in budget.layers:
        if reason := dense_reason(budget, record):
            reasons[reason] += 1
    row.update(
        linear=linear,
        macs_dense=budget.dense_macs,
        layers=len(budget.layers),
        masked=sum(not dense_reason(budget, record) for record in budget.layers),
        cheapest=round(budget.min_ratio(), 4),
        dense=dict(reasons.most_common()),
        unfollowed=dict(list(budget.unfollowed.items())[:5]),
    )
    if not budget.masked:
        return dict(row, outcome="nothing to mask")
    randomize_to(budget, 0.5)
    freeze_masks(masked)
    budget = MacBudget(masked, first, more_examples=more)
    small, _ = slim_with_plan(masked, first, budget, more)
    assert not masked_layers(small)
    problem = next(filter(None, (difference(masked, small, x, RTOL) for x in examples)), "")
    row["in_double"] = False
    if problem:
        in_double = next(filter(None, (difference_in_double(masked, small, x, RTOL) for x in examples)), "")
        row["in_double"] = not in_double
        problem = problem if in_double else ""
    weights, activations = counted(small, first)
    row.update(
        outcome="differs" if problem else "equal",
        problem=problem,
        ratio=round(budget.kept_macs() / budget.dense_macs, 4),
        macs_slim=budget.kept_macs(),
        macs_counter=weights,
        macs_activations=activations,
        parameters_slim=sum(p.numel() for p in small.parameters()),
    )
    return row


def counted(net: Any, example: Any) -> tuple[int, int]:
    """MACs by torch's ``FlopCounterMode``: convolutions and matrix products, and apart from them batched products.

    Batched products (``bmm``, attention) are those of two activations, as a rule, which have no weight to prune.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    net.requires_grad_(False)  # the counter trips over views of parameters that want a gradient
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of the fused MultiheadAttention the counter sees nothing
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _call(net, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    flops = counter.get_flop_counts().get("Global", {})
    apart = {op: n for op, n in flops.items() if "bmm" in str(op) or "attention" in str(op)}
    return (sum(flops.values()) - sum(apart.values())) // 2, sum(apart.values()) // 2


# -- all of them


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else dict(versions={}, networks={})


def save(results: dict[str, Any]) -> None:
    results["networks"] = dict(sorted(results["networks"].items()))
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(part, RESULTS)


def one(name: str, limit: float, memory: float) -> dict[str, Any]:
    """A row, measured in a process of its own; of a process that fails, why."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, name, memory))
    start = time.time()
    process.start()
    theirs.close()
    try:
        row = ours.recv() if ours.poll(limit) else dict(outcome="failed", problem=f"stopped after {limit:.0f} s")
    except EOFError:  # killed
        row = dict(outcome="failed", problem=f"needs more than {memory:g} GiB of memory here")
    process.kill()
    process.join()
    return dict(row, seconds=round(time.time() - start))


def _child(pipe: Any, name: str, memory: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    try:
        row = measure(name)
    except Exception as error:  # a foreign network may fail anywhere
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        row = dict(outcome="failed", problem=re.sub(r"/\S*/", "", f"{type(error).__name__}: {text}")[:300])
        if isinstance(error, MemoryError) or "allocate memory" in text:
            row["problem"] = f"needs more than {memory:g} GiB of memory here"
    pipe.send(row)


def in_order(networks: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Libraries in turn; of torchvision's families one network each before the others."""
    seen: set[str] = set()
    first, later = [], []
    for name in networks.get("torchvision", ()):
        family = re.split(r"[\d_]", name)[0]
        (later if family in seen else first).append(name)
        seen.add(family)
    queues = [
        (library, (*first, *later) if library == "torchvision" else all_of) for library, all_of in networks.items()
    ]
    for turn in itertools.zip_longest(*([(library, name) for name in all_of] for library, all_of in queues)):
        yield from (pair for pair in turn if pair is not None)


def run(args: argparse.Namespace) -> None:
    import mmitp  # noqa: F401  isort: skip
    import torch
    import torchvision.models  # noqa: F401  what children would import again and again

    torch.set_num_threads(1)
    networks = list(in_order(names()))
    for library, name in [pair for only in args.only for pair in networks if fnmatch.fnmatch(pair[1], only)]:
        results = load()
        if name in results["networks"] and not args.again:
            continue
        row = one(name, args.limit, args.memory)
        row["version"] = version_of(library)
        results = load()
        results["networks"][name] = row
        results["versions"].update(versions())
        save(results)
        PAGE.write_text("\n".join(lines_of(results)) + "\n", encoding="utf-8")
        print(f"{name}: {row['outcome']} {row.get('problem', '')[:150]} ({row['seconds']} s)", flush=True)


def version_of(library: str) -> str:
    from importlib.metadata import version

    package = dict(mmdet="onedl-mmdetection", mmpretrain="onedl-mmpretrain").get(library, library)
    try:
        return version(package)
    except ImportError:
        return ""


def versions() -> dict[str, str]:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return dict(torch=version_of("torch"), mmitp=done.stdout.strip())


# -- the page


def short(reason: str) -> str:
    found = next((text for pattern, text in SHORT if re.search(pattern, reason)), None)
    return found or re.sub(r"'[^']*'", "...", reason)[:60]


def exact(name: str, row: dict[str, Any]) -> bool:
    """Whether slimmed outputs equal the masked ones and the counter finds the budget's figure."""
    return row["outcome"] == "equal" and bool(counter_of(name, row))


def counter_of(name: str, row: dict[str, Any]) -> str:
    """What the counter says where it agrees; nothing where it does not."""
    more = row["macs_slim"] - row["macs_counter"]
    if more in (0, row["macs_activations"]):
        return "yes"
    return f"but for {more:,}" if name in EXPLAINED and more == EXPLAINED[name][0] else ""


def lines_of(results: dict[str, Any]) -> Iterator[str]:
    networks = results["networks"]
    yield from INTRODUCTION.format(**results["versions"]).splitlines()
    titles = dict(
        torchvision="torchvision", timm="timm, the smallest network of each family", ultralytics="Ultralytics",
        transformers="Hugging Face transformers", mmdet="MMDetection", mmpretrain="MMPretrain",
    )  # fmt: skip
    yield ""
    yield "| library | networks | exact | differ | not followed or not run |"
    yield "|---|---|---|---|---|"
    for library, title in titles.items():
        rows = {name: row for name, row in networks.items() if name.startswith(f"{library}/")}
        if rows:
            good = sum(exact(*item) for item in rows.items())
            wrong = sum(row["outcome"] == "differs" for row in rows.values())
            yield f"| [{title}](#{anchor(title)}) | {len(rows)} | {good} | {wrong} | {len(rows) - good - wrong} |"
    for library, title in titles.items():
        rows = {name: row for name, row in networks.items() if name.startswith(f"{library}/")}
        if not rows:
            continue
        version = ", ".join(sorted({row["version"] for row in rows.values()} - {""}))
        yield from ("", f"## {title}", "", f"Version {version}.", "")
        yield "| network | input | MMACs | masked | left dense | cheapest | equal | counter |"
        yield "|---|---|---|---|---|---|---|---|"
        for name, row in rows.items():
            yield f"| {name.split('/', 1)[1]} | {cells(name, row)} |"
        for name, (_, why) in EXPLAINED.items():
            if name in rows and exact(name, rows[name]) and counter_of(name, rows[name]) != "yes":
                yield from ("", f"{name.split('/', 1)[1]}: {why}.")


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def cells(name: str, row: dict[str, Any]) -> str:
    if row["outcome"] in ("failed", "nothing to mask"):
        why = row.get("problem", "").replace("|", "/")
        return f"{row.get('input', '')} | | | {row['outcome']}: {why} | | |"
    reasons: collections.Counter[str] = collections.Counter()
    for reason, count in row["dense"].items():
        reasons[short(reason)] += count
    left = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    equal = (
        "yes" + (", in float64" if row["in_double"] else "") if row["outcome"] == "equal" else f"no: {row['problem']}"
    )
    counter = counter_of(name, row) or f"{row['macs_counter']:,} for {row['macs_slim']:,}"
    masked = f"{row['masked']} of {row['layers']}" + (" + linear" if row["linear"] else "")
    mmacs = f"{row['macs_dense'] / 1e6:,.1f}"
    return f"{row['input']} | {mmacs} | {masked} | {left} | {row['cheapest']:.4f} | {equal} | {counter}"


def table(args: argparse.Namespace) -> int:
    text = "\n".join(lines_of(load())) + "\n"
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)} is not what benchmarks/compatibility.json gives: run "
              "`python benchmarks/compatibility.py table`", file=sys.stderr)  # fmt: skip
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure what has no row yet")
    running.add_argument("--only", nargs="+", default=["*"], help="patterns of names, worked off in this order")
    running.add_argument("--again", action="store_true", help="measure those with a row too")
    running.add_argument("--limit", type=float, default=600, help="seconds a network (default 600)")
    running.add_argument("--memory", type=float, default=12, help="GiB a network (default 12)")
    page = commands.add_parser("table", help="write docs/compatibility.md")
    page.add_argument("--check", action="store_true", help="fail if the page is not what the figures give")
    single = commands.add_parser("one", help="print the row of one network")
    single.add_argument("name")
    args = parser.parse_args()
    if args.command == "one":
        print("ROW " + json.dumps(measure(args.name)))
        return 0
    if args.command == "table":
        return table(args)
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
