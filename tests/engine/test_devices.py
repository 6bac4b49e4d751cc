"""Training, pruning, slimming and attacks on a GPU made of labels: nothing of the host comes in between."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import mmitp  # noqa: F401  (makes the stack importable without compiled operators)

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

from mmengine.model import ImgDataPreprocessor
from mmengine.registry import MODELS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent))
import test_detector_attack as detectors
import test_prune_hook as toy  # the toy Runner of the hook's other tests
import test_robust_eval as classifiers

from mmitp.datasets.scenes import write_scenes
from mmitp.engine.hooks import AdversarialHook, PruneHook, collapse_guard
from mmitp.engine.robust_eval import EvalAttack, attacked, evaluate
from mmitp.pruning import masked_layers


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("scenes")
    return str(write_scenes(folder, 2, seed=1, size=(192, 64), val_fraction=0.5))


class Photos(Dataset):
    """32 images of 8x8 pixels, of two classes."""

    metainfo: dict = {}

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (32, 3, 8, 8), generator=generator, dtype=torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return dict(inputs=image, data_samples=(image[:, :4].float().mean() > image[:, 4:].float().mean()).long())


class Preprocessor(ImgDataPreprocessor):
    """Moves and normalises the images; the labels in one tensor."""

    def __init__(self):
        super().__init__(mean=[120.0] * 3, std=[60.0] * 3)

    def forward(self, data, training=False):
        out = super().forward(data, training)
        return dict(inputs=out["inputs"], data_samples=torch.stack(out["data_samples"]))


class Model(toy.Toy):
    def __init__(self):
        super().__init__()
        self.data_preprocessor = Preprocessor()


def make_runner(work_dir, hooks, epochs=4, **kwargs):
    return toy.make_runner(work_dir, None, epochs=epochs, model=Model(), extra_hooks=hooks, dataset=Photos(), **kwargs)


EMA = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1, update_buffers=True)


@pytest.mark.parametrize("b", [10.0, "auto"])
def test_fast_adversarial_pruning_with_guard_average_freeze_and_live_slimming(tmp_path, devices, b):
    prune = PruneHook(target=0.5, b=b, begin=1, end=3, slim_at_end=True)
    hooks = [prune, AdversarialHook(eps=8.0, alpha=10.0), dict(EMA)]
    hooks.append(dict(type="mmitp.CollapseGuardHook", source="train", action="restore"))
    with devices.LogicalGpu() as gpu:
        runner = make_runner(tmp_path, hooks, default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)))
        runner.train()
        state = [v for entry in runner.optim_wrapper.optimizer.state.values() for v in entry.values()]
        tensors = [*runner.model.state_dict().values(), *(v for v in state if isinstance(v, torch.Tensor))]
        assert {tensor.device for tensor in tensors} == {gpu.device}
    assert prune.slimmed is not None
    assert not masked_layers(runner.model)
    assert not gpu.mismatches


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run(tmp_path, devices, stop):
    """In the window, and after the freeze with the small network."""
    checkpoints = dict(checkpoint=dict(type="CheckpointHook", interval=1))

    def hooks():
        return [PruneHook(target=0.5, b="auto", begin=1, end=3, slim_at_end=True), AdversarialHook(), dict(EMA)]

    with devices.LogicalGpu() as gpu:
        make_runner(tmp_path, hooks(), epochs=4, default_hooks=checkpoints).train()
        options = dict(load_from=str(tmp_path / f"epoch_{stop}.pth"), resume=True, default_hooks=checkpoints)
        runner = make_runner(tmp_path / "resumed", hooks(), epochs=4, **options)
        runner.train()
        assert {value.device for value in runner.model.state_dict().values()} == {gpu.device}
    assert runner.iter == 16
    assert not gpu.mismatches


@pytest.mark.parametrize("objective", ["truth", "own", "vanishing", "fabrication"])
@pytest.mark.parametrize("cfg", [detectors.CENTERNET, detectors.RETINANET], ids=["centernet", "retinanet"])
def test_attacks_on_detectors(tmp_path, devices, scenes, cfg, objective):
    attack = EvalAttack("pgd", steps=1, restarts=2 if objective == "truth" else 1, objective=objective, score_thr=0.0)
    with devices.LogicalGpu() as gpu:
        runner = detectors.make_runner(tmp_path, detectors.build_model(cfg), scenes)
        with attacked(runner.model, attack, 8.0, runner.test_loop.dataloader.dataset) as log:
            runner.test()
        assert log.largest == pytest.approx(8, abs=1e-3)
        assert {p.device for p in runner.model.parameters()} == {gpu.device}
    assert not gpu.mismatches


@pytest.mark.parametrize(
    "attack",
    [EvalAttack("fgsm"), EvalAttack("fgsm_rs"), EvalAttack("pgd", steps=2, restarts=2, norm="l2")],
    ids=["fgsm", "fgsm_rs", "pgd-l2"],
)
def test_attacks_on_a_classifier(tmp_path, devices, attack):
    with devices.LogicalGpu() as gpu:
        model = MODELS.build(copy.deepcopy(classifiers.MODEL)).eval()
        runner = classifiers.make_runner(tmp_path, model)
        assert evaluate(runner, attack, [8.0]).largest[0] == pytest.approx(8, abs=0.1)
    assert not gpu.mismatches


def test_a_mistake_in_a_hook_ends_the_run(tmp_path, devices):
    class Wrong(PruneHook):
        def _optimizer_2(self):
            mask = self.masks["body"].prune_mask
            mask.data.sub_(torch.zeros(8))

    with devices.LogicalGpu():
        runner = make_runner(tmp_path, [Wrong(target=0.5, begin=0, end=1)], epochs=1)
        with pytest.raises(devices.DeviceMismatch, match=r"sub_ mixes .*\(_optimizer_2\)"):
            runner.train()


class Made(TorchDispatchMode):
    """Keeps the tensors that are made while it is entered."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.tensors += [
            t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known
        ]
        return out

    def elements(self, device):
        return sum(t.numel() for t in self.tensors if t.device == device)


def test_a_guards_good_state_takes_no_memory_of_the_device(tmp_path, devices):
    """It is kept on the host tensor by tensor; to go back to it takes the optimizer's moments once."""
    optim = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9))
    with devices.LogicalGpu() as gpu:
        runner = make_runner(tmp_path, [], epochs=1, optim=optim)
        runner.train()
        with Made() as made:
            good = collapse_guard._snapshot(runner, 4)
        assert made.elements(gpu.device) == 0
        moments = sum(p.numel() for p in runner.model.parameters())
        with Made() as made:
            assert "is restored" in collapse_guard._restore(runner, good)
        assert made.elements(gpu.device) <= moments + 16  # and what says whether they are finite
    assert not gpu.mismatches


@pytest.mark.parametrize("interval", [3, 100])
def test_the_ratio_is_read_where_it_is_logged(tmp_path, devices, interval):
    """In the iterations of a LoggerHook and at the end of an epoch, here of four iterations."""
    prune = PruneHook(target=0.5, b="auto", begin=0, end=4)
    logger = dict(logger=dict(type="LoggerHook", interval=interval))
    with devices.LogicalGpu():
        runner = make_runner(tmp_path, [prune], epochs=4, default_hooks=logger)
        runner.train()
    logged = len(runner.message_hub.get_scalar("train/ops_kept").data[0])
    assert logged == {3: 8, 100: 4}[interval]
