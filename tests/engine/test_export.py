"""Exported files compute what torch does, for dense, masked and slimmed networks, at any batch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

import mmitp  # noqa: F401
import mmitp.engine.export as export_module
from mmitp.engine.config import read_config
from mmitp.engine.export import export_checkpoint
from mmitp.engine.slim_checkpoint import slim_checkpoint
from mmitp.models.resnet_cifar import ResNetCifar
from mmitp.pruning import freeze_masks, masked_layers
from mmitp.registry import MODELS as OUR_MODELS

MODELS_DIR = Path(__file__).parents[2] / "configs" / "_base_" / "models"
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="onnx and onnxruntime are not installed (extra: export)",
)


class WritesIntoItsArguments(ResNetCifar):
    """As DETR's heads do with the weights of their classes."""

    def __init__(self, some: dict | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if some is not None:
            some["weight"] = torch.ones(3)


def classifier() -> Config:
    cfg = Config.fromfile(MODELS_DIR / "resnet20_cifar.py")
    cfg.model.backbone.depth = 8
    cfg.model.update(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
    cfg.data_preprocessor = dict(num_classes=10, mean=[125.0, 123.0, 114.0], std=[63.0, 62.0, 67.0], to_rgb=False)
    cfg.default_scope = "mmpretrain"
    return cfg


def detector(deformable: bool) -> Config:
    cfg = Config.fromfile(MODELS_DIR / ("centernet_dla34.py" if deformable else "centernet_dla34_plain.py"))
    cfg.model.backbone.width = 0.125
    cfg.model.neck.in_channels = (8, 16, 32, 64)
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8)
    cfg.model.update(type="mmitp.MaskedModel", of="mmdet.CenterNet")
    cfg.default_scope = "mmdet"
    return cfg


def dense(cfg: Config) -> Config:
    cfg = cfg.copy()
    cfg.model.type = cfg.model.pop("of")
    return cfg


def enliven(model: nn.Module) -> None:
    """BatchNorm statistics of random images, and offsets and heads that depend on them.

    Without, signals fade from layer to layer, outputs are their biases, and any two networks agree.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
        if hasattr(module, "conv_offset"):
            nn.init.normal_(module.conv_offset.weight, std=0.1)
    for name in ("heatmap_head", "wh_head", "offset_head"):
        nn.init.normal_(getattr(model.bbox_head, name)[-1].weight, std=0.1)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64), mode="tensor")
    model.eval()


def save(cfg: Config, path: Path, drop: int = 0) -> str:
    """Random weights whose signals reach the outputs, and masks without the first ``drop`` of every eight channels."""
    init_default_scope(cfg.default_scope)  # another test may have left its own
    model: nn.Module = MODELS.build(cfg.model)
    for layer in masked_layers(model).values():
        channels = torch.arange(layer.prune_mask.numel())
        layer.prune_mask.data[channels % 8 < drop] = -1.0
    if cfg.default_scope == "mmdet":
        enliven(model)
    state = {k: v for k, v in model.state_dict().items() if drop or "prune_" not in k}
    torch.save(dict(state_dict=state), path)
    return str(path)


@needs_onnx
def test_the_file_shrinks_with_the_parameters_kept(tmp_path: Path) -> None:
    sizes, parameters = [], []
    for drop in (0, 2, 4, 6):
        checkpoint = save(classifier(), tmp_path / "weights.pth", drop)
        report = export_checkpoint(classifier(), checkpoint, str(tmp_path / "net.onnx"), (32, 32))
        assert report.difference <= 1e-4
        assert report.outputs == ["logits"]
        assert "slimmed" in report.how
        assert report.size == (tmp_path / "net.onnx").stat().st_size
        sizes.append(report.size)
        parameters.append(report.parameters)
    assert parameters == sorted(set(parameters), reverse=True)
    for (big, small), (many, few) in zip(
        zip(sizes, sizes[1:], strict=False), zip(parameters, parameters[1:], strict=False), strict=True
    ):
        # 4 bytes a parameter; the rest of the file (names, gather indices) changes by far less
        assert big - small == pytest.approx(4 * (many - few), rel=0.15)


def test_a_checkpoint_from_within_the_window_is_called_one(tmp_path: Path) -> None:
    path = save(classifier(), tmp_path / "m.pth", 4)
    report = slim_checkpoint(classifier(), path, str(tmp_path / "slim"), (32, 32))
    assert report.text().startswith(f"warning: the masks of {path} are not frozen")
    exported = export_checkpoint(classifier(), path, str(tmp_path / "m.pt"), (32, 32))
    assert exported.text().startswith(f"warning: the masks of {path} are not frozen")
    model = MODELS.build(classifier().model)
    model.load_state_dict(torch.load(path)["state_dict"])
    freeze_masks(model)
    torch.save(dict(state_dict=model.state_dict()), path)
    assert "warning" not in slim_checkpoint(classifier(), path, str(tmp_path / "slim"), (32, 32)).text()


@needs_onnx
def test_a_dense_checkpoint_and_a_slimmed_folder_export_as_they_are(tmp_path: Path) -> None:
    whole = export_checkpoint(
        dense(classifier()), save(dense(classifier()), tmp_path / "d.pth"), str(tmp_path / "d.onnx"), (32, 32)
    )
    slim_checkpoint(classifier(), save(classifier(), tmp_path / "m.pth", 4), str(tmp_path / "slim"), (32, 32))
    folder = tmp_path / "slim"
    small = export_checkpoint(
        Config.fromfile(folder / "config.py"), str(folder / "weights.pth"), str(tmp_path / "s.onnx"), (32, 32)
    )
    assert "as it is" in whole.how
    assert "as it is" in small.how
    assert small.parameters < whole.parameters
    assert small.size < whole.size


@needs_onnx
def test_the_onnx_file_says_what_its_input_is(tmp_path: Path) -> None:
    import onnx

    checkpoint = save(classifier(), tmp_path / "weights.pth", 4)
    export_checkpoint(classifier(), checkpoint, str(tmp_path / "net.onnx"), (32, 32), batch=2)
    model = onnx.load(tmp_path / "net.onnx")
    settings = json.loads({p.key: p.value for p in model.metadata_props}["preprocessing"])
    assert settings == dict(num_classes=10, mean=[125.0, 123.0, 114.0], std=[63.0, 62.0, 67.0], to_rgb=False)
    (images,) = model.graph.input
    assert [d.dim_value for d in images.type.tensor_type.shape.dim] == [2, 3, 32, 32]


@needs_onnx
@pytest.mark.parametrize("deformable", [False, True])
def test_centernet_exports_its_maps_and_boxes(tmp_path: Path, deformable: bool) -> None:
    checkpoint = save(detector(deformable), tmp_path / "weights.pth", 4)
    report = export_checkpoint(detector(deformable), checkpoint, str(tmp_path / "net.onnx"), (32, 64))
    assert report.outputs == ["heatmap", "wh", "offset", "boxes", "labels"]
    assert report.difference <= 1e-4


def small_deformable() -> Config:
    """mmdet's CenterNet on a ResNet-18: three deformable convolutions, where DLA-34 has eighteen."""
    cfg = detector(True)
    cfg.model.backbone = dict(type="mmdet.ResNet", depth=18, base_channels=8, stem_channels=8)
    cfg.model.neck = dict(
        type="mmdet.CTResNetNeck",
        in_channels=64,
        num_deconv_filters=(8, 8, 8),
        num_deconv_kernels=(4, 4, 4),
        use_dcn=True,
    )
    return cfg


@pytest.mark.parametrize(
    ("build", "ending", "slimmed"),
    [
        pytest.param(lambda: detector(True), ".pt", False, id="dla34-dense-pt"),
        pytest.param(lambda: detector(True), ".pt", True, id="dla34-slimmed-pt"),
        pytest.param(small_deformable, ".pt2", True, id="r18-slimmed-pt2"),
    ],
)
def test_deformable_centernet_in_torch_formats(
    tmp_path: Path, build: Callable[[], Config], ending: str, slimmed: bool
) -> None:
    cfg = build() if slimmed else dense(build())
    torch.manual_seed(0)
    out = str(tmp_path / f"net{ending}")
    report = export_checkpoint(cfg, save(cfg, tmp_path / "weights.pth", 4 if slimmed else 0), out, (32, 64))
    assert report.outputs == ["heatmap", "wh", "offset", "boxes", "labels"]
    assert report.difference <= 1e-4
    run = torch.jit.load(out) if ending == ".pt" else torch.export.load(out).module()
    with torch.no_grad():
        maps, one = run(torch.randn(5, 3, 32, 64)), run(torch.zeros(1, 3, 32, 64))
    assert [tuple(m.shape) for m in maps] == [(5, 3, 8, 16), (5, 2, 8, 16), (5, 2, 8, 16), (5, 100, 5), (5, 100)]
    assert all((m[:1] - n).abs().max() > 1e-3 * n.abs().max() for m, n in zip(maps[:3], one, strict=False))


@pytest.mark.parametrize("ending", [".pt", ".pt2"])
def test_torch_formats_take_any_batch(tmp_path: Path, ending: str) -> None:
    out = str(tmp_path / f"net{ending}")
    export_checkpoint(classifier(), save(classifier(), tmp_path / "weights.pth", 4), out, (32, 32))
    load = torch.jit.load if ending == ".pt" else lambda file: torch.export.load(file).module()
    assert load(out)(torch.zeros(5, 3, 32, 32))[0].shape == (5, 10)


def test_a_file_that_computes_something_else_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(network: export_module.RawOutputs, batch: int | None, cfg: Config) -> object:
        return b"", lambda images: [1.001 * o for o in network(images)]

    monkeypatch.setattr(export_module, "_traced", off)
    (tmp_path / "net.pt").write_text("the former one")
    with pytest.raises(RuntimeError, match=r"would differ from torch by 0.001"):
        export_checkpoint(classifier(), save(classifier(), tmp_path / "w.pth"), str(tmp_path / "net.pt"), (32, 32))
    assert (tmp_path / "net.pt").read_text() == "the former one"


def test_a_missing_shape_a_wrong_ending_and_another_networks_weights_are_named(tmp_path: Path) -> None:
    checkpoint = save(classifier(), tmp_path / "weights.pth", 4)
    with pytest.raises(ValueError, match="give --shape"):
        export_checkpoint(classifier(), checkpoint, str(tmp_path / "net.pt"))
    with pytest.raises(ValueError, match=r"\.onnx, \.pt2, \.pt"):
        export_checkpoint(classifier(), checkpoint, str(tmp_path / "net.tflite"), (32, 32))
    with pytest.raises(ValueError, match="does not fit"):
        export_checkpoint(detector(False), checkpoint, str(tmp_path / "net.pt"), (32, 32))


def test_two_stage_detectors_are_declined_by_name(tmp_path: Path) -> None:
    class NeedsSamples(nn.Module):
        def forward(self, images: torch.Tensor, samples: None, mode: str) -> None:
            raise TypeError("'NoneType' object is not iterable")

    with pytest.raises(ValueError, match="NeedsSamples does not run on images alone"):
        export_module.RawOutputs(NeedsSamples(), (32, 32))


def test_a_network_that_asserts_its_data_samples_is_declined_by_name() -> None:
    class Asserts(nn.Module):
        def forward(self, images: torch.Tensor, samples: None, mode: str) -> None:
            assert samples is not None

    with pytest.raises(ValueError, match="Asserts does not run on images alone"):
        export_module.RawOutputs(Asserts(), (32, 32))


def test_the_checkpoint_itself_is_not_written_over(tmp_path: Path) -> None:
    checkpoint = save(classifier(), tmp_path / "net.pt", 4)
    before = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "link.pt").symlink_to(tmp_path / "net.pt")
    for out in ("net.pt", "link.pt"):
        with pytest.raises(ValueError, match="is the input"):
            export_checkpoint(classifier(), checkpoint, str(tmp_path / out), (32, 32))
    assert (tmp_path / "net.pt").read_bytes() == before


def test_names_that_wrappers_left_fit_all_the_same(tmp_path: Path) -> None:
    state = torch.load(save(classifier(), tmp_path / "weights.pth", 4))["state_dict"]
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        torch.save(dict(state_dict={prefix + key: value for key, value in state.items()}), tmp_path / "wrapped.pth")
        slim_checkpoint(classifier(), str(tmp_path / "wrapped.pth"), str(tmp_path / prefix), (32, 32))
        slimmed = torch.load(tmp_path / prefix / "weights.pth")["state_dict"]
        assert "head.fc.weight" in slimmed
    report = export_checkpoint(classifier(), str(tmp_path / "wrapped.pth"), str(tmp_path / "net.pt"), (32, 32))
    assert "slimmed" in report.how


def test_a_config_without_a_scope_slims_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(classifier(), tmp_path / "weights.pth", 4)
    cfg = classifier()
    cfg.default_scope = None  # as mmdet's configs in the newer style have it
    monkeypatch.setattr(DefaultScope, "_instance_dict", {})
    slim_checkpoint(cfg, checkpoint, str(tmp_path / "slim"), (32, 32))
    export_checkpoint(cfg, checkpoint, str(tmp_path / "net.pt"), (32, 32))
    assert DefaultScope.get_current_instance() is None


def test_what_a_model_writes_into_its_config_is_not_in_the_slimmed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save(classifier(), tmp_path / "weights.pth", 4)
    cfg = classifier()
    monkeypatch.setitem(OUR_MODELS._module_dict, "Writes", WritesIntoItsArguments)
    cfg.model.backbone.update(type="mmitp.Writes", some=dict(weight=1))
    slim_checkpoint(cfg, checkpoint, str(tmp_path / "slim"), (32, 32))
    assert read_config(tmp_path / "slim" / "config.py").model.backbone.some == dict(weight=1)


def test_slimming_writes_over_nothing_but_slimmed_networks(tmp_path: Path) -> None:
    checkpoint = save(classifier(), tmp_path / "weights.pth", 4)
    before = (tmp_path / "weights.pth").read_bytes()
    with pytest.raises(ValueError, match="is the input"):
        slim_checkpoint(classifier(), checkpoint, str(tmp_path), (32, 32))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.py").write_text("model = dict(type='Mine')")
    with pytest.raises(ValueError, match="is no slimmed network's"):
        slim_checkpoint(classifier(), checkpoint, str(tmp_path / "run"), (32, 32))
    assert (tmp_path / "weights.pth").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.py"]
    slim = tmp_path / "slim"
    for _ in range(2):
        slim_checkpoint(classifier(), checkpoint, str(slim), (32, 32))
    (slim / "config.py").unlink()  # as a stopped writer leaves it
    slim_checkpoint(classifier(), checkpoint, str(slim), (32, 32))
    assert (slim / "config.py").exists()


@pytest.mark.parametrize("content", [dict(meta=dict(epoch=3), state_dict=dict(weight=torch.ones(1))), "a note"])
def test_weights_of_another_network_alone_in_a_folder_stay(content: object, tmp_path: Path) -> None:
    checkpoint = save(classifier(), tmp_path / "trained.pth", 4)
    (tmp_path / "run").mkdir()
    kept = tmp_path / "run" / "weights.pth"
    torch.save(content, kept)
    before = kept.read_bytes()
    with pytest.raises(ValueError, match="run/weights.pth exists and is no slimmed network's: give another folder"):
        slim_checkpoint(classifier(), checkpoint, str(kept.parent), (32, 32))
    assert kept.read_bytes() == before and [path.name for path in kept.parent.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (dict(model=dict(a=torch.ones(1)), epoch=3), "'model', 'epoch'. If those under 'model' are the network's"),
        (dict(optimizer=dict(state={}, param_groups=[]), epoch=3), "its keys are 'optimizer', 'epoch'"),
    ],
)
def test_a_file_without_weights_is_told_from_one_without_masks(content: dict, text: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth holds no weights, for it lacks state_dict: .*{text}"):
        slim_checkpoint(classifier(), str(tmp_path / "other.pth"), str(tmp_path / "slim"), (32, 32))


@needs_onnx
def test_gathers_and_scatters_are_operators_that_runtimes_have(tmp_path: Path) -> None:
    import onnx

    checkpoint = save(detector(False), tmp_path / "m.pth", 3)
    kinds = {}
    for gathers in (True, False):
        out = str(tmp_path / f"{gathers}.onnx")
        report = export_checkpoint(detector(False), checkpoint, out, (64, 96), batch=1, gathers=gathers)
        assert report.difference <= 1e-4
        onnx.utils.extract_model(out, out + "_maps.onnx", ["images"], ["heatmap", "wh", "offset"])
        kinds[gathers] = {node.op_type for node in onnx.load(out + "_maps.onnx").graph.node}
    plain = {"Conv", "ConvTranspose", "Relu", "Add", "Concat", "MaxPool", "Sigmoid"}
    assert kinds[True] - plain - {"Constant", "Identity", "Cast"} == {"Gather"}
    assert kinds[False] - plain <= {"Constant", "Identity", "Cast"}
    assert "MACs at 64x96; products in place of gathers add " in report.how
