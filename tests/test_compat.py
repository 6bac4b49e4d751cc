"""compat acts at import time, so most of it is seen in fresh interpreters."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
needs_stack = pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None, reason="the OpenMMLab stack is not installed (extra mm)"
)


def run(code, *command):
    """Run code in a fresh interpreter; its output, error output included."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    arguments = command or ("-c", textwrap.dedent(code))
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_import_mmitp_imports_nothing_heavy():
    out = run("import sys, mmitp; print([m for m in ('torch', 'numpy', 'mmcv', 'mmengine') if m in sys.modules])")
    assert out.strip() == "[]"


@needs_stack
@pytest.mark.parametrize("first", ["import mmitp", "from mmengine.runner import Runner\nimport mmitp"])
def test_stack_imports_whatever_was_imported_before(first):
    out = run(
        first
        + """
from mmdet.apis import init_detector
import mmcv.ops, mmpretrain, torchvision
from mmengine.runner import Runner
print("imported")
"""
    )
    assert "imported" in out


@needs_stack
def test_config_with_custom_imports_is_enough_for_a_plain_script(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("custom_imports = dict(imports=['mmitp'], allow_failed_imports=False)\n")
    out = run(
        f"""
        from mmengine.config import Config
        from mmdet.utils import setup_cache_size_limit_of_dynamo  # as mmdet's tools/train.py begins
        Config.fromfile({str(config)!r})
        import mmcv.ops
        print(mmcv.ops.modulated_deform_conv2d.__module__)
        """
    )
    assert "mmitp.compat" in out


def test_runner_module_passes_arguments_and_mends_before_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(__name__, sys.argv[1:], sys.path[0], 'mmitp' in sys.modules)\n")
    out = run(None, "-m", "mmitp", str(script), "config.py", "--work-dir", "w")
    assert out.strip() == f"__main__ ['config.py', '--work-dir', 'w'] {tmp_path.resolve()} True"


@needs_stack
def test_missing_operator_says_what_to_do():
    ext = pytest.importorskip("mmcv.ops.nms").ext_module
    if ext.__spec__.origin != "mmitp.compat":
        pytest.skip("mmcv has compiled operators here")
    with pytest.raises(NotImplementedError, match=r"'ball_query_forward'.*compiled operators \(mmitp's README"):
        ext.ball_query_forward()


@needs_stack
def test_it_says_once_what_it_mended():
    pytest.importorskip("mmcv.ops")
    from mmitp import compat

    if sys.modules["mmcv._ext"].__spec__.origin != "mmitp.compat":
        pytest.skip("mmcv has compiled operators here")
    said = run("import mmitp, mmcv.ops, importlib; importlib.reload(mmcv.ops)")
    assert said.count("no compiled operators") == 1
    assert any("no compiled operators" in line for line in compat.mended())


@needs_stack
def test_mmcv_functions_run_without_compiled_operators():
    import mmcv.ops

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    dets, kept = mmcv.ops.batched_nms(boxes, scores, torch.tensor([0, 0, 1]), dict(type="nms", iou_threshold=0.5))
    assert kept.tolist() == [0, 2]
    torch.testing.assert_close(dets[:, 4], scores[kept])
    dets, kept = mmcv.ops.batched_nms(boxes, scores, torch.tensor([0, 0, 1]), dict(type="soft_nms", iou_threshold=0.5))
    assert kept.tolist() == [0, 2, 1]
    torch.testing.assert_close(dets[2, 4], torch.tensor(0.8 * (1 - 0.9)))
    dets, kept = mmcv.ops.nms(boxes.numpy(), scores.numpy(), 0.5, score_threshold=0.75, max_num=1)
    assert isinstance(dets, np.ndarray)
    assert kept.tolist() == [0]


def torchvision_like(called, works=("cpu",)):
    """torchvision.ops as it is where its library loads, by its documentation, for the devices it was built for."""
    from types import ModuleType

    from mmitp.ops.roi_align import roi_align as plain_roi_align

    def check(x):
        if x.device.type not in works:
            raise NotImplementedError("Could not run 'torchvision::nms' with arguments from this backend")

    def nms(boxes, scores, iou_threshold):
        check(boxes)
        assert boxes.dtype == scores.dtype == torch.float32
        called.append("nms")
        kept = []
        for i in scores.argsort(descending=True, stable=True).tolist():
            b = boxes[[i, *kept]]
            wh = (torch.minimum(b[0, 2:], b[1:, 2:]) - torch.maximum(b[0, :2], b[1:, :2])).clamp(min=0)
            area = (b[:, 2:] - b[:, :2]).prod(1)
            if not (wh.prod(1) / (area[0] + area[1:] - wh.prod(1)) > iou_threshold).any():
                kept.append(i)
        return torch.tensor(kept, dtype=torch.long)

    def roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
        check(input)
        called.append("roi_align")
        if isinstance(boxes, list):
            boxes = torch.cat([torch.cat([box.new_full((len(box), 1), i), box], 1) for i, box in enumerate(boxes)])
        size = (output_size, output_size) if isinstance(output_size, int) else output_size
        return plain_roi_align(input, boxes, size, spatial_scale, max(sampling_ratio, 0), aligned)

    module = ModuleType("torchvision.ops")
    vars(module).update(nms=nms, roi_align=roi_align)
    return module


@pytest.fixture
def plain_mmcv(monkeypatch):
    """mmcv.ops without compiled operators, and nothing known of torchvision's."""
    ops = pytest.importorskip("mmcv.ops")
    from mmitp import compat

    if sys.modules["mmcv._ext"].__spec__.origin != "mmitp.compat":
        pytest.skip("mmcv has compiled operators here")
    compat._torchvision_ops.cache_clear()
    yield ops
    compat._torchvision_ops.cache_clear()


@needs_stack
@pytest.mark.parametrize("offset", [0, 1])
def test_nms_is_torchvisions_where_its_operators_run(plain_mmcv, monkeypatch, offset):
    from mmitp.ops.nms import nms

    called = []
    monkeypatch.setitem(sys.modules, "torchvision.ops", torchvision_like(called))
    corner = torch.randint(0, 30, (200, 2)).float()
    boxes = torch.cat([corner, corner + torch.randint(0, 20, (200, 2))], 1)  # whole numbers: ties, and empty boxes
    scores = torch.randint(0, 40, (200,)) / 40
    for threshold in (0.0, 0.3, 0.7):
        _, kept = plain_mmcv.nms(boxes.double(), scores, threshold, offset)
        assert called[-1] == "nms"
        assert kept.tolist() == nms(boxes, scores, threshold, offset).tolist()
    assert plain_mmcv.nms(boxes[:0], scores[:0], 0.5)[1].tolist() == []


@needs_stack
def test_roi_align_is_torchvisions_with_its_own_gradient(plain_mmcv, monkeypatch):
    called = []
    x = torch.randn(2, 3, 8, 9, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 13, 9], [1, 0, 0, 17, 15], [1, 5, 5, 5.5, 5.2]])
    layers = [plain_mmcv.RoIAlign((2, 3), 0.5, ratio, aligned=aligned) for ratio in (0, 2) for aligned in (True, False)]
    plain = [layer(x, rois) for layer in layers]
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in plain]
    from mmitp import compat

    compat._torchvision_ops.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision.ops", torchvision_like(called))
    for layer, expected, gradient in zip(layers, plain, gradients, strict=True):
        out = layer(x, rois)
        assert out.grad_fn.name() != "RoIAlignFunctionBackward"
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], gradient)
    assert called.count("roi_align") == 1 + len(layers)  # one to try
    half = layers[0](x.detach().half(), rois.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), plain[0], atol=2e-2, rtol=2e-2)


@needs_stack
@pytest.mark.parametrize("trouble", ["absent", "other device"])
def test_plain_operators_stay_where_torchvisions_do_not_run(plain_mmcv, monkeypatch, trouble):
    module = None if trouble == "absent" else torchvision_like([], works=("cuda",))
    monkeypatch.setitem(sys.modules, "torchvision.ops", module)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 9]])
    assert plain_mmcv.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1].tolist() == [0, 2]
    pooled = plain_mmcv.RoIAlign((1, 1), sampling_ratio=1)(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 4, 4]]))
    assert pooled.item() == 1


@needs_stack
def test_mmcv_roi_align_and_focal_loss_have_gradients():
    import mmcv.ops

    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    out = mmcv.ops.RoIAlign((2, 2), sampling_ratio=2)(x, torch.tensor([[0.0, 0.5, 0.5, 4.5, 4.5]]))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient.sum(), torch.tensor(8.0))  # 2 x 2 bins and 2 channels, weights of each sum to 1

    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([1.0, 2, 3], dtype=torch.float64)
    ours = mmcv.ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "sum")
    p = torch.where(torch.nn.functional.one_hot(target, 3).bool(), logits.sigmoid(), 1 - logits.sigmoid())
    alpha = torch.where(torch.nn.functional.one_hot(target, 3).bool(), 0.25, 0.75)
    reference = (-alpha * (1 - p) ** 2 * p.log() * weight[target][:, None]).sum()
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(reference, logits))


@needs_stack
@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
def test_deformable_layers_start_as_convolutions_and_learn_displacements(kind):
    import mmcv.ops

    layer_type = dict(DCN=mmcv.ops.DeformConv2dPack, DCNv2=mmcv.ops.ModulatedDeformConv2dPack)[kind]
    layer = layer_type(4, 6, 3, stride=2, padding=1, deform_groups=2)
    x = torch.randn(2, 4, 7, 8)
    plain = torch.nn.functional.conv2d(x, layer.weight, None, 2, 1) * (0.5 if kind == "DCNv2" else 1)  # sigmoid(0)
    torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters() if p.dim() == 4)


@needs_stack
def test_displacements_of_a_larger_map_are_read_as_by_mmcv_kernels():
    import mmcv.ops

    # One tap. For output (i, j), mmcv takes displacement c from number (c * ho + i) * wo + j of the memory of an image,
    # whatever shape the field has.
    x = torch.arange(12.0).view(1, 1, 3, 4).repeat(2, 1, 1, 1)
    offset, mask = torch.randint(-1, 2, (2, 2, 5, 6)).float(), torch.rand(2, 1, 5, 6)
    offset.requires_grad_()
    out = mmcv.ops.modulated_deform_conv2d(x, offset, mask, torch.ones(1, 1, 1, 1), None, 1, 0, 1, 1, 1)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        dy, dx = (int(offset[b].flatten()[(c * 3 + i) * 4 + j]) for c in range(2))
        inside = 0 <= i + dy < 3 and 0 <= j + dx < 4
        expected = mask[b].flatten()[i * 4 + j] * x[b, 0, i + dy, j + dx] if inside else torch.tensor(0.0)
        torch.testing.assert_close(out[b, 0, i, j], expected, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert offset.grad.flatten(1)[:, 24:].eq(0).all()
    with pytest.raises(ValueError, match="offset must be"):
        mmcv.ops.modulated_deform_conv2d(
            x, offset[:, :, :2, :2], mask[:, :, :2, :2], torch.ones(1, 1, 1, 1), None, 1, 0, 1, 1, 1
        )


@needs_stack
def test_registry_resolves_mmitp_scope_by_itself():
    run(
        """
        import mmitp
        from mmengine.registry import MODELS
        import mmitp.registry as registry
        registry.MODELS._locations.clear()  # the look-up itself, without the models' own imports
        @registry.MODELS.register_module()
        class Probe: pass
        assert MODELS.get('mmitp.Probe') is Probe
        assert registry.MODELS.get('Probe') is Probe
        """
    )
    run("import mmitp; from mmengine.registry import MODELS; assert MODELS.get('mmitp.DLA') is not None")


@needs_stack
def test_every_registry_location_can_be_imported():
    import mmitp.registry as registry

    for name in registry.__all__:
        getattr(registry, name).import_from_location()


def test_checkpoints_with_histories_load_with_mmengine_of_2024(tmp_path):
    """A module that loads as mmengine 0.10.7 does gets a torch.load that reads mmengine's own checkpoints."""
    from types import ModuleType

    from mmitp import compat

    file = tmp_path / "epoch_1.pth"
    torch.save(dict(message_hub=dict(runtime_info=slice(1, 2)), state_dict={}), file)
    module = ModuleType("checkpoint")
    module.torch = torch
    exec("def load_from_local(filename):\n    return torch.load(filename, map_location='cpu')", vars(module))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        module.load_from_local(file)
    compat._mend_checkpoint(module)
    assert module.load_from_local(file)["message_hub"] == dict(runtime_info=slice(1, 2))
    assert module.torch.nn is torch.nn
    with pytest.raises(Exception, match=r"[Ww]eights"):
        torch.load(file)  # nobody else's torch has changed


def test_torchvision_with_a_matching_build_is_left_alone():
    from types import SimpleNamespace

    from mmitp import compat

    before = list(compat._torchvision_schemas)
    compat._mend_torchvision(SimpleNamespace(_has_ops=lambda: True))
    assert compat._torchvision_schemas == before


def test_extension_that_does_not_load_is_replaced(tmp_path):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("")
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package / f"_ext{suffix}").write_bytes(b"not a library")
    out = run(
        f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        import mmitp, mmcv._ext
        print(mmcv._ext.get_compiler_version())
        """
    )
    assert "do not load and are left aside" in out
    assert "not available" in out


@needs_stack
def test_two_processes_train_on_the_cpu(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from mmengine.model import BaseModel
            from mmengine.runner import Runner

            class Toy(BaseModel):
                def __init__(self):
                    super().__init__()
                    self.layer = torch.nn.Linear(1, 1, bias=False)
                    torch.nn.init.zeros_(self.layer.weight)
                def forward(self, x, y, mode='tensor'):
                    return dict(loss=((self.layer(x) - y) ** 2).mean())

            runner = Runner(
                Toy(), sys.argv[1], launcher='pytorch',
                train_dataloader=dict(
                    dataset=[dict(x=torch.ones(1), y=torch.tensor([v])) for v in (1.0, 3.0)],
                    batch_size=1, num_workers=0, collate_fn=dict(type='default_collate'),
                    sampler=dict(type='DefaultSampler', shuffle=False)),
                train_cfg=dict(by_epoch=True, max_epochs=1),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.25)), default_hooks=dict(logger=None))
            runner.train()
            with open(f'{sys.argv[1]}_rank{runner.rank}', 'w') as file:  # printed lines of two processes may mix
                file.write(str(runner.model.module.layer.weight.item()))
            """
        )
    )
    run(
        None, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmitp",
        str(script), str(tmp_path / "work"),
    )  # fmt: skip
    # gradients -2 and -6 are averaged to -4: each process alone would end at 0.5 and 1.5
    assert [(tmp_path / f"work_rank{rank}").read_text() for rank in (0, 1)] == ["1.0", "1.0"]
