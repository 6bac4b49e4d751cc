"""The detection experiments: they parse, compose, and build what their comments say."""

from pathlib import Path

import pytest
from mmengine import Config
from mmengine.registry import HOOKS, MODELS, DefaultScope

import mmitp  # noqa: F401
from mmitp.engine.example import blank_example
from mmitp.engine.hooks import AdversarialHook, CollapseGuardHook, PruneHook
from mmitp.pruning import masked_layers
from mmitp.pruning.check import counted_macs
from mmitp.report.measure import dense_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MAIN = "centernet_dla34_kitti_prune50.py"
NAMES = [
    p.relative_to(CONFIGS).as_posix() for p in sorted(CONFIGS.glob("**/centernet_*.py")) if "_base_" not in p.parts
]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_its_model_and_a_window_that_fits(name):
    cfg = Config.fromfile(CONFIGS / name)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
    pruned = "prune" in name
    assert bool(masked_layers(model)) == pruned
    assert type(model).__name__ == "CenterNet"
    if pruned:
        hook = HOOKS.build(cfg.custom_hooks[0])
        assert isinstance(hook, PruneHook)
        assert hook.window[1] <= cfg.train_cfg.max_epochs


ROBUST = [
    p.relative_to(CONFIGS).as_posix() for f in ("kitti", "demo") for p in sorted((CONFIGS / f).glob("*_robust.py"))
]


@pytest.mark.parametrize("name", ROBUST)
def test_robust_config_is_the_clean_one_with_the_attack(name):
    robust, clean = Config.fromfile(CONFIGS / name), Config.fromfile(CONFIGS / name.replace("_robust", ""))
    *pruning, attack, guard = robust.pop("custom_hooks")
    assert pruning == clean.pop("custom_hooks", [])
    attack = HOOKS.build(attack)
    assert isinstance(attack, AdversarialHook)
    assert (attack.eps, attack.alpha, attack.losses) == (2, 2.5, None)
    assert isinstance(HOOKS.build(guard), CollapseGuardHook)
    robust.pop("fastat")
    if "short" in name:  # equal processor time: an attacked step costs about two
        for cfg in (robust, clean):
            for key in ("train_cfg", "param_scheduler", "max_epochs"):
                cfg.pop(key, None)
    assert robust.to_dict() == clean.to_dict()


def test_the_stronger_attack_changes_nothing_else():
    name = "kitti/centernet_dla34x025_kitti1348_short_prune50_fisher_robust"
    base, strong = (Config.fromfile(CONFIGS / f"{name}{ending}.py") for ending in ("", "_eps4"))
    attack = strong.custom_hooks[1]
    assert (attack.eps, attack.alpha) == (4, 5)
    attack.eps, attack.alpha = 2, 2.5
    assert strong.to_dict() == base.to_dict()


def test_the_main_config_masks_all_but_stem_and_dead_projections():
    cfg = Config.fromfile(CONFIGS / "kitti" / MAIN)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
    layers = masked_layers(model)
    assert sum(layer.prune_mask.numel() for layer in layers.values()) == 12_512
    assert "backbone.base_layer.0" not in layers
    assert not any(name.startswith(("backbone.level3.project", "backbone.level4.project")) for name in layers)


def test_the_papers_split_has_one_class():
    cfg = Config.fromfile(CONFIGS / "kitti/centernet_dla34_kitti_car_75_25_prune50.py")
    assert cfg.model.bbox_head.num_classes == 1
    assert cfg.train_dataloader.dataset.metainfo.classes == ("Car",)


def test_the_readmes_name_for_the_main_job_is_the_main_job():
    short, main = (Config.fromfile(CONFIGS / n) for n in ("centernet_kitti_prune50.py", f"kitti/{MAIN}"))
    assert short.to_dict() == main.to_dict()


def test_rtmdet_prunes_the_weights_it_trains_and_decays_no_mask():
    cfg = Config.fromfile(CONFIGS / "kitti/rtmdet_tiny_kitti_prune50.py")
    assert [hook.type for hook in cfg.custom_hooks] == ["EMAHook", "PipelineSwitchHook", "mmitp.PruneHook"]
    assert (cfg.model.type, cfg.model.of) == ("mmitp.MaskedModel", "mmdet.RTMDet")
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.prune_mask.decay_mult == 0


def test_pruned_short_runs_differ_in_their_target_only():
    half, third = (
        Config.fromfile(CONFIGS / f"kitti/centernet_dla34x025_kitti1348_short_prune{n}.py") for n in (50, 30)
    )
    assert (half.custom_hooks[0].pop("target"), third.custom_hooks[0].pop("target")) == (0.5, 0.3)
    third.pop("prune", None)
    assert half.to_dict() == third.to_dict()


@pytest.mark.parametrize(
    ("name", "shape", "times", "gmacs"),
    [
        ("kitti/rtmdet_tiny_kitti.py", (192, 640), 1, 2.3923),
        # fully convolutional: on a quarter of the pixels a quarter of the operations
        ("kitti/centernet_dla34_plain_kitti_prune50.py", (192, 640), 4, 57.0969),
    ],
)
def test_the_operations_that_the_readme_states(name: str, shape: tuple[int, int], times: int, gmacs: float) -> None:
    model = dense_model(Config.fromfile(CONFIGS / name))
    assert times * counted_macs(model, blank_example(model, shape)) / 1e9 == pytest.approx(gmacs, abs=5e-5)
