"""Every classification experiment parses, says what its name says, and its dense model builds and trains a step."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain")
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted([*CONFIGS.glob("cifar10/*.py"), *CONFIGS.glob("imagenet/*.py")])
PRUNED = [f for f in FILES if "psi" in f.stem]
DENSE = [f for f in FILES if "psi" not in f.stem]


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize(
    "stem",
    [
        *(
            f"resnet{d}_cifar10{s}"
            for d in (20, 56)
            for s in ("", "_psi20_b10", "_psi20_b50", "_short", "_psi50_short")
        ),
        *(f"resnet{d}_cifar10_psi{p}" for d in (20, 56) for p in (30, 40, 50, 70)),
        *(f"resnet20_cifar10_psi30_{s}" for s in ("noreg", "init03", "noreg_init03")),
        *(f"resnet{d}_imagenet{s}" for d in (18, 50) for s in ("", "_psi70", "_psi50", "_psi30")),
    ],
)
def test_every_row_of_the_tables_has_its_file(stem: str) -> None:
    assert stem in {f.stem for f in FILES}


@pytest.mark.parametrize("path", PRUNED, ids=name)
def test_pruned_config_is_the_dense_one_with_masks_and_a_hook(path: Path) -> None:
    pruned, stem = Config.fromfile(path), path.stem
    base = re.sub(r"_(psi\d+|b\d+|noreg|init03|weight)", "", stem)
    dense = Config.fromfile(path.with_name(f"{base}.py"))
    model = dict(pruned.model)
    assert model.pop("type") == "mmitp.MaskedModel"
    assert model.pop("of") == "mmpretrain.ImageClassifier"
    prune = model.pop("prune", {})
    assert model == {k: v for k, v in dense.model.items() if k != "type"}
    assert dense.model.type == "ImageClassifier"

    (hook,) = pruned.custom_hooks
    assert hook.type == "mmitp.PruneHook"
    assert round(100 * hook.target) == int(re.search(r"psi(\d+)", stem)[1])
    b = re.search(r"_b(\d+)", stem)
    assert b is None or hook.b == int(b[1])
    epochs = pruned.train_cfg.max_epochs
    assert epochs == dense.train_cfg.max_epochs
    assert (hook.begin, hook.end) == {300: (20, 240), 100: (7, 80), 10: (1, 8)}[epochs]

    assert prune.get("init", 1.0) == (0.3 if "init03" in stem else 1.0)
    assert prune.get("granularity", "channel") == ("weight" if "weight" in stem else "channel")
    keys = pruned.optim_wrapper.get("paramwise_cfg", {}).get("custom_keys", {})
    assert keys == ({"prune_mask": {"decay_mult": 0.0}} if "noreg" in stem else {})
    assert pruned.optim_wrapper.optimizer == dense.optim_wrapper.optimizer


@pytest.mark.parametrize("path", DENSE, ids=name)
def test_dense_model_builds_and_gives_a_finite_loss(path: Path) -> None:
    config = Config.fromfile(path)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        preprocessor = config.get("data_preprocessor", {})
        model = MODELS.build({**config.model, "data_preprocessor": {**preprocessor}})
        model.init_weights()
    samples = [DataSample().set_gt_label(1), DataSample().set_gt_label(2)]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    data = model.data_preprocessor({"inputs": images, "data_samples": samples}, training=True)
    loss = model(**data, mode="loss")["loss"]
    assert loss.isfinite()
    assert model.head.num_classes == preprocessor["num_classes"]


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_cifar_networks_have_the_stated_parameters(depth: int, parameters: int) -> None:
    config = Config.fromfile(CONFIGS / f"cifar10/resnet{depth}_cifar10.py")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_paper_schedules() -> None:
    cifar = Config.fromfile(CONFIGS / "cifar10/resnet20_cifar10.py")
    assert (cifar.train_cfg.max_epochs, cifar.train_dataloader.batch_size) == (300, 256)
    assert (cifar.optim_wrapper.optimizer.lr, cifar.optim_wrapper.optimizer.weight_decay) == (0.1, 1e-4)
    assert (cifar.param_scheduler.milestones, cifar.param_scheduler.gamma) == ([80, 160, 240], 0.1)
    imagenet = Config.fromfile(CONFIGS / "imagenet/resnet18_imagenet.py")
    assert (imagenet.train_cfg.max_epochs, imagenet.optim_wrapper.optimizer.lr) == (100, 0.1)
    assert (imagenet.param_scheduler.milestones, imagenet.param_scheduler.gamma) == ([30, 60, 90], 0.1)
