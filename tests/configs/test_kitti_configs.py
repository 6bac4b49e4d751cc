"""The detection experiments: they parse, compose, and build what their comments say."""

from pathlib import Path

import pytest
from mmengine import Config
from mmengine.registry import HOOKS, MODELS, DefaultScope

import mmitp  # noqa: F401
from mmitp.engine.hooks import AdversarialHook, CollapseGuardHook, PruneHook
from mmitp.pruning import masked_layers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
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
        assert hook.end <= cfg.train_cfg.max_epochs


@pytest.mark.parametrize("name", [n for n in NAMES if "robust" in n])
def test_robust_config_is_the_clean_one_with_the_attack(name):
    robust, clean = Config.fromfile(CONFIGS / name), Config.fromfile(CONFIGS / name.replace("_robust", ""))
    *pruning, attack, guard = robust.pop("custom_hooks")
    assert pruning == clean.pop("custom_hooks", [])
    attack = HOOKS.build(attack)
    assert isinstance(attack, AdversarialHook)
    assert (attack.eps, attack.alpha, attack.losses) == (2, 2.5, None)
    assert isinstance(HOOKS.build(guard), CollapseGuardHook)
    robust.pop("fastat")
    assert robust.to_dict() == clean.to_dict()


def test_the_main_config_masks_all_but_stem_and_dead_projections():
    cfg = Config.fromfile(CONFIGS / "centernet_kitti_prune50.py")
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
    layers = masked_layers(model)
    assert sum(layer.prune_mask.numel() for layer in layers.values()) == 12_512
    assert "backbone.base_layer.0" not in layers
    assert not any(name.startswith(("backbone.level3.project", "backbone.level4.project")) for name in layers)


def test_the_papers_split_has_one_class():
    cfg = Config.fromfile(CONFIGS / "centernet_kitti_car_75_25_prune50.py")
    assert cfg.model.bbox_head.num_classes == 1
    assert cfg.train_dataloader.dataset.metainfo.classes == ("Car",)
