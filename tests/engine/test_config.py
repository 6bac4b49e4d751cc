"""Configs and overrides: what nothing would read is refused with the nearest key that something does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmitp.engine import config as module
from mmitp.engine.config import load_config

CONFIG = str(Path(__file__).parents[2] / "configs" / "cifar10" / "resnet20_cifar10_psi50_short.py")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("optim_wraper.accumulative_counts=2", "the config has no 'optim_wraper'; the nearest is 'optim_wrapper'"),
        ("custom_hook.0.target=0.3", "the nearest is 'custom_hooks'"),
        ("data_root=D/", "the config has no 'data_root'"),
        ("custom_hooks.0.targett=0.3", r"custom_hooks.0 \(mmitp.PruneHook\) has no 'targett'; .* 'target'"),
        ("optim_wrapper.optimizer.lrr=1", r"optim_wrapper.optimizer \(SGD\) has no 'lrr'; the nearest is 'lr'"),
        ("train_cfg.max_epoch=2", "train_cfg has no 'max_epoch'; the nearest is 'max_epochs'"),
        ("model.backbone.depht=8", "the nearest is 'depth'"),
        ("model.prun.exclude=[head]", "the nearest is 'prune'"),
        ("train_dataloader.num_worker=1", "the nearest is 'num_workers'"),
        ("custom_hooks.5.target=1", "custom_hooks is a list of 1 without an entry '5'"),
        ("train_cfg.max_epochs.x=3", "train_cfg.max_epochs is 10, which has no 'x'"),
        ("custom_hooks.0=1", "does not fit the config"),
        ("custom_hooks=[dict(type=mmitp.PruneHook,target=0.5)]", "cannot be read.*key by key"),
        ("custom_hooks.0.input_shape=(32,32", "Imbalanced brackets"),
        ("custom_hooks..target=1", "takes key=value"),
        ("custom_hooks.0.target", "takes key=value"),
    ],
)
def test_options_that_nothing_would_read_are_refused(option: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_config(CONFIG, [option])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("custom_hooks.0.target=0.3", 0),
        ("custom_hooks.0.divisor=8", 0),  # not in the config, but an argument of its class
        ("custom_hooks.0.cost.type=params", 0),
        ("optim_wrapper.optimizer.dampening=0.1", 0),
        ("model.prune.exclude=[head]", 0),
        ("test_dataloader.dataset.augment=False", 0),
        ("load_from=dense.pth", 0),  # in no config, but read by the Runner
        ("randomness.seed=3", 0),
        ("compile=True", 0),
        ("train_dataloader.persistent_workers=True", 1),  # nobody knows who might read it
    ],
)
def test_keys_that_something_takes_may_be_new(option: str, said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module, "print_log", lambda text, **_: lines.append(text))
    cfg = load_config(CONFIG, [option])
    key, _, value = option.partition("=")
    node = cfg
    for part in key.split("."):
        node = node[int(part)] if part.isdecimal() else node[part]
    assert str(node) in (value, "['head']")
    assert len(lines) == said


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("train_dataloader.batch_size=0", "train_dataloader.batch_size must be a whole number of at least 1, got 0"),
        ("val_dataloader.num_workers=-1", "val_dataloader.num_workers must be a whole number of at least 0, got -1"),
        ("train_cfg.max_epochs=0", "train_cfg.max_epochs must be a whole number of at least 1, got 0"),
        ("train_cfg.max_epochs=2.5", "train_cfg.max_epochs must be a whole number of at least 1, got 2.5"),
        ("optim_wrapper.accumulative_counts=0", "optim_wrapper.accumulative_counts must be a whole number"),
        ("optim_wrapper.optimizer.lr=nan", "optim_wrapper.optimizer.lr is NaN"),
        ("custom_hooks.0.lr=nan", "custom_hooks.0.lr is NaN"),
    ],
)
def test_values_that_make_no_run_are_refused(option: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "print_log", lambda text, **_: None)
    with pytest.raises(ValueError, match=re.escape(f"{CONFIG}: {says}")):
        load_config(CONFIG, [option])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("syntax.py", "model = dict(\n"),
        ("raises.py", "raise RuntimeError('x')\n"),
        ("base.py", "_base_ = ['nope.py']\n"),
        ("text.txt", "hello"),
        ("broken.json", "{bad"),
    ],
)
def test_files_that_are_no_configs_are_named(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as a config: "):
        load_config(str(path))


@pytest.mark.parametrize("source", ["nope.py", "mmdet::nope/nope", "nopackage::x"])
def test_configs_that_do_not_exist_are_named(source: str) -> None:
    with pytest.raises(ValueError, match=source.rpartition("::")[2].split("/")[0]):
        load_config(source)
