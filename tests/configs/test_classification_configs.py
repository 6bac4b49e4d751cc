"""Every classification experiment parses, says what its name says, and its dense model builds and trains a step."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain")
from mmengine.config import Config
from mmengine.registry import HOOKS, PARAM_SCHEDULERS, DefaultScope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn

from mmitp.engine.example import blank_example
from mmitp.engine.hooks import AdversarialHook, CollapseGuardHook
from mmitp.pruning import MacBudget, masked_layers
from mmitp.pruning.freeze import require_reachable

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
        *(f"resnet20_cifar10_psi30_{s}" for s in ("noreg", "init03", "noreg_init03", "early")),
        "resnet56_cifar10_psi50_early",
        *(f"resnet{d}_imagenet{s}" for d in (18, 50) for s in ("", "_psi70", "_psi50", "_psi30")),
        *(f"resnet{d}_cifar10_fastat{s}" for d in (20, 56) for s in ("", "_psi70", "_psi50", "_psi30")),
        *(f"resnet{d}_imagenet_fastat{s}" for d in (18, 50) for s in ("", "_psi70", "_psi50", "_psi30")),
        *(f"resnet20_cifar10_fastat{s}" for s in ("_short", "_psi50_short")),
        *(f"resnet18_imagenette_fastat{s}" for s in ("_short", "_psi50_short")),
    ],
)
def test_every_row_of_the_tables_has_its_file(stem: str) -> None:
    assert stem in {f.stem for f in FILES}


def stretched(schedulers: list[dict], epochs: int) -> list[dict]:
    """The short schedule's one-cycle of learning rate and momentum, in another number of epochs."""
    keys = ("total_steps", "begin", "end")
    return [{k: pytest.approx(v * epochs / 10) if k in keys else v for k, v in s.items()} for s in schedulers]


@pytest.mark.parametrize("path", PRUNED, ids=name)
def test_pruned_config_is_the_dense_one_with_masks_and_a_hook(path: Path) -> None:
    pruned, stem = Config.fromfile(path), path.stem
    base = re.sub(r"_(psi\d+|b\d+|noreg|init03|weight|auto|slim|early|stream|tied|brief|distill)", "", stem)
    dense = Config.fromfile(path.with_name(f"{base}.py"))
    model = dict(pruned.model)
    assert model.pop("type") == "mmitp.MaskedModel"
    assert model.pop("of") == "mmpretrain.ImageClassifier"
    prune = model.pop("prune", {})
    assert model == {k: v for k, v in dense.model.items() if k != "type"}
    assert dense.model.type == "ImageClassifier"

    hook, *others = pruned.custom_hooks
    distilled = "distill" in stem
    assert [h.type for h in others if h.type in ("EMAHook", "mmitp.DistillHook")] == (
        ["EMAHook", "mmitp.DistillHook"] if distilled else []
    )
    assert others[2 * distilled :] == dense.get("custom_hooks", [])
    assert hook.type == "mmitp.PruneHook"
    assert round(100 * hook.target) == int(re.search(r"psi(\d+)", stem)[1])
    b = re.search(r"_b(\d+)", stem)
    assert b is None or hook.b == int(b[1])
    brief = "brief" in stem  # a window of half an epoch
    tied = "tied" in stem or brief or "early" in stem and "short" not in stem  # masks tied over streams: the default
    early = "early" in stem or tied  # search early, then train what is small
    assert prune.get("share") == ("stream" if tied or "stream" in stem else None)
    assert pruned.optim_wrapper.get("paramwise_cfg", {}).get("bypass_duplicate", False) == ("share" in prune)
    loop = "auto" in stem or "slim" in stem or early  # the closed loop, without decay on the masks
    assert hook.b == "auto" or not loop
    epochs = pruned.train_cfg.max_epochs
    slimmed = "slim" in stem or early  # in a short schedule of its own length: cheaper epochs
    assert hook.get("slim_at_end", False) == slimmed
    cheaper = slimmed and "short" in stem
    assert epochs >= (9 if distilled else 11) if cheaper else epochs == dense.train_cfg.max_epochs
    assert pruned.param_scheduler == (stretched(dense.param_scheduler, epochs) if cheaper else dense.param_scheduler)
    windows = {300: (20, 240), 100: (7, 80), 12: (1, 4), 10: (1, 8), 5: (1, 4)}
    short = (1, 2) if tied else (1, 3) if "early_auto" in stem else (0, 1)
    short = (0.25 / epochs, 0.75 / epochs) if brief else short
    assert hook.get("by_epoch", True) is not brief
    window = (1 / 15, 1 / 3) if epochs == 300 else short
    assert (hook.begin, hook.end) == (window if early else windows[epochs])

    assert prune.get("init", 1.0) == (0.3 if "init03" in stem else 1.0)
    assert prune.get("granularity", "channel") == ("weight" if "weight" in stem else "channel")
    keys = pruned.optim_wrapper.get("paramwise_cfg", {}).get("custom_keys", {})
    assert keys == ({"prune_mask": {"decay_mult": 0.0}} if "noreg" in stem or loop else {})
    assert pruned.optim_wrapper.optimizer == dense.optim_wrapper.optimizer


@pytest.mark.parametrize("path", [f for f in FILES if "fastat" in f.stem], ids=name)
def test_robust_config_is_the_clean_one_with_the_published_attack(path: Path) -> None:
    robust = Config.fromfile(path)
    attack, guard = (HOOKS.build(hook) for hook in robust.custom_hooks if hook.type != "mmitp.PruneHook")
    assert isinstance(attack, AdversarialHook)
    assert (attack.eps, attack.alpha) == ((8, 10) if "cifar10" in path.stem else (2, 2.5))
    assert (attack.attack, attack.begin, attack.end, attack.warmup) == ("fgsm_rs", 0, None, 0)
    assert isinstance(guard, CollapseGuardHook)
    assert guard.action == "warn"
    clean = Config.fromfile(path.with_name(path.name.replace("_fastat", "")))
    for key in ("model", "data_preprocessor", "train_dataloader", "test_dataloader"):
        assert robust[key] == clean[key]
    if "cifar10_fastat" not in path.stem or "short" not in path.stem:  # CIFAR-10's short schedule is of its own length
        for key in ("optim_wrapper", "param_scheduler", "train_cfg"):
            assert robust[key] == clean[key]


def test_the_short_schedule_cycles_as_torchs_one_cycle_and_keeps_the_forces_on_a_mask() -> None:
    config = Config.fromfile(CONFIGS / "cifar10/resnet20_cifar10_psi50_short.py")
    iterations = -(-50_000 // config.train_dataloader.batch_size)
    prune, settings = config.custom_hooks[0], config.optim_wrapper.optimizer
    optimizer, twin = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], settings.lr, settings.momentum) for _ in "ab")
    schedulers = [
        PARAM_SCHEDULERS.build(dict(s), default_args=dict(optimizer=optimizer, epoch_length=iterations))
        for s in config.param_scheduler
    ]
    steps = config.train_cfg.max_epochs * iterations
    cycle = torch.optim.lr_scheduler.OneCycleLR(twin, settings.lr, total_steps=steps)
    pull = 0.0
    for _ in range(steps - 1):
        ours, torchs = optimizer.param_groups[0], twin.param_groups[0]
        assert ours["lr"] == pytest.approx(torchs["lr"])
        assert ours["momentum"] == pytest.approx(torchs["momentum"], abs=1e-4)
        pull += ours["lr"] / (1 - ours["momentum"])
        for step in (optimizer.step, twin.step, cycle.step, *(s.step for s in schedulers)):
            step()
    paper = 196 * (80 * (0.1 + 0.01 + 0.001) + 60 * 1e-4) / (1 - 0.9)
    assert pull * settings.weight_decay == pytest.approx(paper * 1e-4, rel=0.05)
    assert prune.lr * (prune.end - prune.begin) * iterations == pytest.approx(0.01 * 220 * 196, rel=0.02)


def test_the_short_robust_schedule_keeps_the_forces_on_a_mask() -> None:
    """Sums over the run of Optimizer 2's rates, and of rate * decay, against the 300 epochs it stands for."""
    short = Config.fromfile(CONFIGS / "cifar10/resnet20_cifar10_fastat_psi50_short.py")
    prune, cycle = short.custom_hooks[0], short.param_scheduler
    iterations = -(-50_000 // short.train_dataloader.batch_size)
    assert prune.lr * (prune.end - prune.begin) * iterations == pytest.approx(0.01 * 220 * 196, rel=0.01)
    rates = cycle.eta_max / 2 * cycle.total_steps * iterations
    paper = 196 * (80 * (0.1 + 0.01 + 0.001) + 60 * 1e-4)
    assert rates * short.optim_wrapper.optimizer.weight_decay == pytest.approx(paper * 1e-4, rel=0.15)


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


@pytest.mark.parametrize("recipe", ["early", "trained_hook"])
def test_a_recipe_stands_beside_any_dense_config(tmp_path: Path, recipe: str) -> None:
    base, dense = CONFIGS / f"_base_/pruning/{recipe}.py", CONFIGS / "cifar10/resnet20_cifar10_short.py"
    lines = [f'_base_ = ["{dense}", "{base}"]']
    lines += [line.removeprefix("#     ") for line in base.read_text().splitlines() if line.startswith("#     ")][1:]
    (tmp_path / "recipe.py").write_text("\n".join(lines))
    cfg = Config.fromfile(tmp_path / "recipe.py")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        assert masked_layers(MODELS.build(cfg.model))
    hook = HOOKS.build(cfg.custom_hooks[0])
    assert (hook.target, hook.slim_at_end) == (0.5, True)
    assert hook.arguments["push"] == {"early": None, "trained_hook": "fisher"}[recipe]
    assert cfg.get("load_from") == {"early": None, "trained_hook": "my_dense.pth"}[recipe]
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.prune_mask.decay_mult == 0
    assert cfg.optim_wrapper.optimizer.lr == Config.fromfile(dense).optim_wrapper.optimizer.lr


@pytest.mark.parametrize(
    "path", [f for f in PRUNED if f.stem.startswith("resnet20") and "weight" not in f.stem], ids=name
)
def test_every_pruned_resnet20_has_a_target_that_its_freeze_can_meet(path: Path) -> None:
    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(cfg.model)
    hook = HOOKS.build(cfg.custom_hooks[0])
    keep = {key: hook.arguments[key] for key in ("divisor", "min_keep")}
    require_reachable(MacBudget(model, blank_example(model, (32, 32)), check=False), hook.target, **keep)
