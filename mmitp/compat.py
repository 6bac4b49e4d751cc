"""Makes the OpenMMLab stack work where its compiled operators are missing.

:func:`install`, called by ``import mmitp``, puts one finder in front of ``sys.meta_path``. It imports nothing and acts
only when a module named here is imported later, or has been before:

``mmcv._ext``
    Missing (mmcv installed without a compiler) or not loadable: a module takes its place in which nms and RoIAlign are
    torchvision's or plain torch, soft nms and the focal loss plain torch, and every other operator raises an error
    that says what to do.
``mmcv.ops.modulated_deform_conv``, ``mmcv.ops.deform_conv``
    The deformable convolutions go through :func:`mmitp.ops.modulated_deform_conv2d`, which picks the fastest exact
    implementation for the device.
``mmcv.ops.roi_align``
    Without compiled operators of mmcv's own, RoIAlign goes to torchvision's where that runs (tried once for each kind
    of device), gradient and all.
``torchvision.extension``
    A C++ library that does not load (built against another torch): the two operator schemas without which torchvision
    cannot be imported are declared. With a matching build nothing is touched.
``mmcv.cnn.utils.fuse_conv_bn``
    Folds a norm into a slimmed convolution too, which computes fewer channels than the norm has.
``mmengine.config.utils``, ``mmengine.config.config``
    ``mmitp::kitti/...`` names a config of this package, in ``_base_`` and in ``get_config``. Its types keep the scope
    that the config itself states (mmdet's or mmpretrain's), as a file's would.
``mmengine.runner.checkpoint``
    mmengine up to 0.10.7 on torch 2.6 and later: its own checkpoints load again. They are pickles, as they ever were:
    load those that you trust.
``mmengine.dist.utils``, ``mmengine.model.wrappers.distributed``
    Distributed training without CUDA: gloo is the backend, and the wrapper gets no device numbers.
``mmcv.transforms.loading``
    An image that cannot be read is named in the error, also where it has no bytes. One that is read lying on its side,
    by its EXIF note, with annotations for the picture as it is stored (or the other way round), is refused; one of
    another size than its annotations say is told of.
``mmdet.datasets.api_wrappers.coco_api``
    An annotation file in which two images or two classes have one id is refused: pycocotools mixes them up.
``mmdet.models.dense_heads.ssd_head``
    SSD's head lacks an attribute that mmdet's shared inference code reads.

``python -m mmitp SCRIPT ARGUMENTS`` runs any script with all this in place from its first line on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

logger = logging.getLogger("mmitp")

_EXT = "mmcv._ext"
_said: set[str] = set()
#: the first image of another size than its annotations are for
_scaled: list[str] = []


def _say(message: str) -> None:
    """Log what was mended, once in a process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def mended() -> list[str]:
    """What has been mended in this process so far, as the log said it."""
    return sorted(_said)


# --- mmcv._ext -------------------------------------------------------------------------------------------------------


@functools.cache
def _torchvision_ops(device: str) -> ModuleType | None:
    """``torchvision.ops`` if its compiled operators run on a kind of device (``'cpu'``, ``'cuda'``), else ``None``.

    Whether they do is found by trying: torchvision may be absent, built against another torch, or without CUDA.
    """
    import torch

    try:
        ops = importlib.import_module("torchvision.ops")
        box = torch.tensor([[0.0, 0, 2, 2]], device=device)
        kept = ops.nms(box, box[:, 0], 0.5)
        ops.roi_align(box.view(1, 1, 2, 2), [box], 1)
        return ops if kept.tolist() == [0] else None
    except Exception as error:  # whatever goes wrong there, the plain operators do the work
        logger.debug("torchvision's operators do not run on %s: %s", device, error)
        return None


def _nms(boxes: Any, scores: Any, iou_threshold: float, offset: int) -> Any:
    ops = _torchvision_ops(boxes.device.type)
    if ops is None:
        from mmitp.ops.nms import nms

        return nms(boxes, scores, iou_threshold, offset)
    boxes = boxes.detach().float()
    if offset:  # pixels counted inclusively: width x2 - x1 + 1, in intersections too
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return ops.nms(boxes, scores.detach().float(), iou_threshold)


def _softnms(
    boxes: Any,
    scores: Any,
    dets: Any,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Any:
    from mmitp.ops.nms import soft_nms

    kept, indices = soft_nms(boxes, scores, iou_threshold, sigma, min_score, method, offset)
    dets[: len(kept)] = kept
    return indices


def _roi_align_args(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs["pool_mode"] != 1:
        raise NotImplementedError("RoIAlign with pool_mode='max' needs mmcv's compiled operators; use pool_mode='avg'.")
    return dict(
        output_size=(kwargs["aligned_height"], kwargs["aligned_width"]),
        spatial_scale=kwargs["spatial_scale"],
        sampling_ratio=kwargs["sampling_ratio"],
        aligned=kwargs["aligned"],
    )


def _roi_align_forward(x: Any, rois: Any, output: Any, argmax_y: Any, argmax_x: Any, **kwargs: Any) -> None:
    from mmitp.ops.roi_align import roi_align

    output.copy_(roi_align(x, rois, **_roi_align_args(kwargs)))


def _roi_align_backward(grad: Any, rois: Any, argmax_y: Any, argmax_x: Any, grad_input: Any, **kwargs: Any) -> None:
    import torch

    from mmitp.ops.roi_align import roi_align

    # pooling is linear in the feature map, so its gradient does not depend on the values of the map
    with torch.enable_grad():
        x = torch.zeros_like(grad_input, requires_grad=True)
        grad_input.copy_(torch.autograd.grad(roi_align(x, rois, **_roi_align_args(kwargs)), x, grad)[0])


def _class_weight(weight: Any, target: Any) -> Any:
    """Weight of each row by its class; mmcv passes an empty tensor for none."""
    return weight[target][:, None] if weight.numel() else 1.0


def _sigmoid_focal_loss_forward(x: Any, target: Any, weight: Any, output: Any, gamma: float, alpha: float) -> None:
    from mmitp.ops.focal_loss import sigmoid_focal_loss

    output.copy_(sigmoid_focal_loss(x, target, gamma, alpha) * _class_weight(weight, target))


def _sigmoid_focal_loss_backward(x: Any, target: Any, weight: Any, grad_input: Any, gamma: float, alpha: float) -> None:
    import torch

    from mmitp.ops.focal_loss import sigmoid_focal_loss

    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = (sigmoid_focal_loss(x, target, gamma, alpha) * _class_weight(weight, target)).sum()
        grad_input.copy_(torch.autograd.grad(loss, x)[0])


def _not_compiled() -> str:
    return "not available (mmcv without compiled operators)"


_OPS: dict[str, Callable[..., Any]] = {
    "nms": _nms,
    "softnms": _softnms,
    "roi_align_forward": _roi_align_forward,
    "roi_align_backward": _roi_align_backward,
    "sigmoid_focal_loss_forward": _sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": _sigmoid_focal_loss_backward,
    "get_compiler_version": _not_compiled,
    "get_compiling_cuda_version": _not_compiled,
}


def _missing_op(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's operator '{name}' needs its compiled extension (mmcv._ext), which is not installed, and mmitp has "
            "no plain-torch version of it. Install an mmcv with compiled operators (mmitp's README says how), or use a "
            "model without this operator."
        )

    missing.__name__ = name
    return missing


class _PlainExt(importlib.abc.Loader):
    """Loads the module that stands in for ``mmcv._ext``."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_OPS, __getattr__=_missing_op, __doc__="mmcv's operators in plain torch, by mmitp.compat.")
        _say(
            "mmcv has no compiled operators here: nms and roi_align are torchvision's where those run, else plain "
            "torch, as soft_nms, focal loss and deformable convolutions are; other operators raise errors when called."
        )


def _plain_if_unloadable(spec: importlib.machinery.ModuleSpec) -> None:
    """Let the plain module take over where an extension is found but does not load (built against another torch)."""
    assert spec.loader is not None
    create = spec.loader.create_module

    def create_module(spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        try:
            return create(spec)
        except ImportError as error:
            _say(f"mmcv's compiled operators do not load and are left aside ({error}).")
            spec.loader = _PlainExt()
            return None

    spec.loader.create_module = create_module  # type: ignore[method-assign]


# --- after the import of a module -------------------------------------------------------------------------------------


def _plain(ext: ModuleType) -> bool:
    return isinstance(getattr(ext.__spec__, "loader", None), _PlainExt)


def _compiled_for_cuda(ext: ModuleType) -> bool:
    return not _plain(ext) and ext.get_compiling_cuda_version() != "not available"


def _replace(module: ModuleType, name: str, function: Callable[..., Any]) -> None:
    """Put ``function`` into a module of ``mmcv.ops`` and, if that is imported already, into the package."""
    setattr(module, name, function)
    package = sys.modules.get("mmcv.ops")
    if package is not None and hasattr(package, name):
        setattr(package, name, function)


def _as_kernels_read(field: Any, size: tuple[int, int]) -> Any:
    """A field larger than the output, as mmcv's kernels take it: an image's memory in the output's size.

    DyHead passes the displacements of one pyramid level for the next smaller one, and public weights were trained so.
    """
    if tuple(field.shape[2:]) == size or field.shape[2] * field.shape[3] < size[0] * size[1]:
        return field
    n, channels = field.shape[:2]
    return field.flatten(1)[:, : channels * size[0] * size[1]].reshape(n, channels, *size)


def _mend_roi_align(module: ModuleType) -> None:
    if not _plain(module.ext_module):
        return
    original = module.roi_align

    def roi_align(
        input: Any,
        rois: Any,
        output_size: Any,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
    ) -> Any:
        """mmcv's RoIAlign by torchvision's operator, forward and backward, where that runs and pools the same way."""
        ops = _torchvision_ops(input.device.type) if pool_mode == "avg" else None
        if ops is None:
            return original(input, rois, output_size, spatial_scale, sampling_ratio, pool_mode, aligned)
        # torchvision has no kernels for bfloat16, nor for half precision on the CPU.
        x = input if input.element_size() >= 4 else input.float()
        pooled = ops.roi_align(x, rois.to(x.dtype), output_size, spatial_scale, sampling_ratio, aligned)
        return pooled.to(input.dtype)

    _replace(module, "roi_align", roi_align)


def _mend_modulated_deform_conv(module: ModuleType) -> None:
    from mmitp.ops import deform_conv

    if _compiled_for_cuda(module.ext_module):
        deform_conv.register_compiled(module.modulated_deform_conv2d)

    def modulated_deform_conv2d(
        input: Any,
        offset: Any,
        mask: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        deform_groups: int = 1,
    ) -> Any:
        """:func:`mmitp.ops.modulated_deform_conv2d` in the precision of ``offset``, as mmcv has it under autocast."""
        size = deform_conv.output_size(input, weight, stride, padding, dilation)
        offset, mask = _as_kernels_read(offset, size), _as_kernels_read(mask, size)
        return deform_conv.modulated_deform_conv2d(
            input.type_as(offset), offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups
        )

    _replace(module, "modulated_deform_conv2d", modulated_deform_conv2d)


def _mend_deform_conv(module: ModuleType) -> None:
    from mmitp.ops import deform_conv

    compiled = module.deform_conv2d if _compiled_for_cuda(module.ext_module) else None

    def deform_conv2d(
        input: Any,
        offset: Any,
        weight: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> Any:
        """:func:`mmitp.ops.modulated_deform_conv2d` without modulation; ``im2col_step`` matters to mmcv's CUDA only."""
        if compiled is not None and input.is_cuda:
            return compiled(input, offset, weight, stride, padding, dilation, groups, deform_groups, bias, im2col_step)
        return deform_conv.modulated_deform_conv2d(
            input.type_as(offset), offset, None, weight, None, stride, padding, dilation, groups, deform_groups
        )

    _replace(module, "deform_conv2d", deform_conv2d)


_torchvision_schemas: list[Any] = []


def _mend_torchvision(module: ModuleType) -> None:
    if module._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_schemas.append(library)  # the schemas live as long as this object
    _say("torchvision's compiled operators do not load beside this torch: torchvision is imported without them.")


def _mend_checkpoint(module: ModuleType) -> None:
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6) or hasattr(module, "_safe_torch_load"):  # the maintained mmengine brings its own remedy
        return

    def load(*args: Any, **kwargs: Any) -> Any:
        return torch.load(*args, **{"weights_only": False, **kwargs})

    view = ModuleType("torch")  # torch as this one module sees it
    vars(view).update(load=load, __getattr__=lambda name: getattr(torch, name))
    module.torch = view  # type: ignore[attr-defined]
    _say("this mmengine cannot load its own checkpoints with torch >= 2.6: it does again (weights_only=False).")


def _mend_fuse_conv_bn(module: ModuleType) -> None:
    original = module._fuse_conv_bn

    def _fuse_conv_bn(conv: Any, bn: Any) -> Any:
        from mmitp.pruning.deploy import fold_norm
        from mmitp.pruning.slim_layers import SlimLayer

        if not isinstance(conv, SlimLayer):
            return original(conv, bn)
        fold_norm(conv, bn)
        return conv

    module._fuse_conv_bn = _fuse_conv_bn  # type: ignore[attr-defined]


def _mend_config_packages(module: ModuleType) -> None:
    module.MODULE2PACKAGE["mmitp"] = "mmitp"


def _mend_config_scope(module: ModuleType) -> None:
    original = module.Config._get_cfg_path

    def _get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = original(cfg_path, filename)
        return path, None if scope == "mmitp" else scope

    module.Config._get_cfg_path = staticmethod(_get_cfg_path)


def _mend_dist(module: ModuleType) -> None:
    original = module._init_dist_pytorch

    def _init_dist_pytorch(backend: str, *args: Any, **kwargs: Any) -> None:
        import torch

        accelerators = ("is_mlu_available", "is_npu_available", "is_musa_available")
        if torch.cuda.is_available() or any(getattr(module, name, bool)() for name in accelerators):
            original(backend, *args, **kwargs)
            return
        _say("no accelerator here: distributed training uses the gloo backend on the CPU.")
        kwargs.pop("init_backend", None)
        torch.distributed.init_process_group(backend="gloo", **kwargs)

    module._init_dist_pytorch = _init_dist_pytorch  # type: ignore[attr-defined]


def _mend_ddp(module: ModuleType) -> None:
    wrapper = module.MMDistributedDataParallel
    original = wrapper.__init__

    @functools.wraps(original)
    def __init__(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            kwargs["device_ids"] = None  # the Runner passes the local rank, which torch takes for modules on CUDA only
        original(self, module, *args, **kwargs)

    wrapper.__init__ = __init__


def _mend_ssd(module: ModuleType) -> None:
    if not hasattr(module.SSDHead, "loss_cls"):
        module.SSDHead.loss_cls = None


def _mend_loading(module: ModuleType) -> None:
    original = module.LoadImageFromFile.transform

    @functools.wraps(original)
    def transform(self: Any, results: dict[str, Any]) -> Any:
        try:
            loaded = original(self, results)
        except OSError:  # names the file
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"{results.get('img_path')} cannot be read as an image, it is damaged or none ({said}): mend it, or "
                "take it out of the data set"
            ) from error
        if loaded is not None:
            _compare_size(loaded)
        return loaded

    module.LoadImageFromFile.transform = transform


def _compare_size(loaded: dict[str, Any]) -> None:
    """Compares an image with the size that its annotations are for, where they say it.

    Raises:
        ValueError: the two are turned against each other.
    """
    said, found = (loaded.get("height"), loaded.get("width")), loaded["img"].shape[:2]
    if None in said or said == found:
        return
    sizes = (
        f"{loaded.get('img_path')} is {found[1]} pixels wide and {found[0]} high as it is read, and its annotations "
        f"are for {said[1]} and {said[0]}"
    )
    if said == found[::-1]:
        raise ValueError(
            f"{sizes}: photos that are stored lying on their side have an EXIF note, by which they are turned upright. "
            "If the boxes are for the upright picture, correct width and height in the annotations; if they are for "
            "the picture as it is stored, LoadImageFromFile(color_type='color_ignore_orientation') reads it so"
        )
    if not _scaled:
        _scaled.append(sizes)
        logger.warning(
            "%s: if pictures were scaled, their boxes have to be scaled, too. (Said of the first one.)", sizes
        )


def _mend_coco_api(module: ModuleType) -> None:
    original = module.COCO.__init__

    @functools.wraps(original)
    def __init__(self: Any, annotation_file: Any = None) -> None:
        from mmitp.engine.coco_file import mixed_up

        original(self, annotation_file)
        if fault := mixed_up(self.dataset):
            raise ValueError(f"{annotation_file}: {fault}")

    module.COCO.__init__ = __init__


_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "mmcv.ops.roi_align": _mend_roi_align,
    "mmcv.ops.modulated_deform_conv": _mend_modulated_deform_conv,
    "mmcv.ops.deform_conv": _mend_deform_conv,
    "torchvision.extension": _mend_torchvision,
    "mmcv.cnn.utils.fuse_conv_bn": _mend_fuse_conv_bn,
    "mmengine.config.utils": _mend_config_packages,
    "mmengine.config.config": _mend_config_scope,
    "mmengine.runner.checkpoint": _mend_checkpoint,
    "mmengine.dist.utils": _mend_dist,
    "mmengine.model.wrappers.distributed": _mend_ddp,
    "mmcv.transforms.loading": _mend_loading,
    "mmdet.datasets.api_wrappers.coco_api": _mend_coco_api,
    "mmdet.models.dense_heads.ssd_head": _mend_ssd,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _EXT and fullname not in _AFTER:
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                break
        if fullname == _EXT:
            if spec is None:
                return importlib.machinery.ModuleSpec(fullname, _PlainExt(), origin="mmitp.compat")
            _plain_if_unloadable(spec)
        elif spec is not None and spec.loader is not None:
            # only exec_module of this one loader: sources, resources and reload stay as they are
            execute, after = spec.loader.exec_module, _AFTER[fullname]

            def exec_module(module: ModuleType) -> None:
                execute(module)
                after(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Install the finder and mend what has already been imported (idempotent)."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, after in _AFTER.items():
        if name in sys.modules:
            after(sys.modules[name])
    early = [name for name in ("mmdet.models", "mmdet.structures") if name in sys.modules]
    if early and "mmcv.ops" not in sys.modules:
        _say(
            f"{' and '.join(early)} came before mmitp and had to do without mmcv's operators: import mmitp first, "
            "or run the script as `python -m mmitp SCRIPT`."
        )
