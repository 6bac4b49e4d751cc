"""Whole paths on the device: the hooks together, CenterNet's loss, CIFAR-10 in memory, and a captured step."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

sys.path.insert(0, str(Path(__file__).parent))
from twins import TOLERANCE, compare, gradients, under

from mmitp.datasets.cifar import FastCIFAR10
from mmitp.engine.hooks import AdversarialHook, PruneHook
from mmitp.pruning import masked_layers

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("folders")


@pytest.mark.parametrize("b", [10.0, "auto"])
def test_attack_pruning_guard_average_freeze_and_live_slimming(device: torch.device, tmp_path: Path, b: Any) -> None:
    toys: Any = importlib.import_module("test_devices")
    prune = PruneHook(target=0.5, b=b, begin=1, end=3, slim_at_end=True)
    guard = dict(type="mmitp.CollapseGuardHook", source="train", action="restore")
    saves = dict(checkpoint=dict(type="CheckpointHook", interval=1))
    hooks = [prune, AdversarialHook(eps=8.0, alpha=10.0), dict(toys.EMA), guard]
    runner = toys.make_runner(tmp_path, hooks, default_hooks=saves)
    runner.train()
    assert prune.slimmed is not None
    assert prune.slimmed["ratio"] <= 0.5
    assert not masked_layers(runner.model)
    assert {p.device.type for p in runner.model.parameters()} == {device.type}
    options = dict(load_from=str(tmp_path / "epoch_2.pth"), resume=True, default_hooks=saves)
    again = [PruneHook(target=0.5, b=b, begin=1, end=3, slim_at_end=True), AdversarialHook(), dict(toys.EMA)]
    resumed = toys.make_runner(tmp_path / "resumed", again, **options)
    resumed.train()
    ends = [{k: v.cpu() for k, v in r.model.state_dict().items()} for r in (runner, resumed)]
    assert {k: v.shape for k, v in ends[0].items()} == {k: v.shape for k, v in ends[1].items()}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_centernets_targets_and_loss(device: torch.device, dtype: torch.dtype) -> None:
    toys: Any = importlib.import_module("test_centernet_devices")
    model, raw, results = toys.build(ROOT / "configs/_base_/models"), toys.batch(3), []
    for place, precision in (("cpu", torch.float32), (device, dtype)):
        twin = copy.deepcopy(model).to(place).eval()
        data = twin.data_preprocessor(copy.deepcopy(raw), training=True)
        with under(precision, torch.device(place)):
            losses = twin(**data, mode="loss")
        named = dict(twin.named_parameters())
        chosen = {k: v for k, v in named.items() if k.startswith("bbox_head") or k.endswith("base_layer.0.weight")}
        total = torch.stack([value.float() for value in losses.values()])
        results.append(gradients(total, chosen))
    head, dtype_of_loss = ({"output": r["output"]} for r in results), dtype
    compare(*head, dtype_of_loss)
    if dtype == torch.float32:
        compare(*results)
    assert all(torch.isfinite(value).all() for value in results[1].values())


def test_images_held_on_the_device_are_cut_as_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    root = importlib.import_module("toys").toy_cifar10(tmp_path, 8)
    sets = [FastCIFAR10(root, seed=3, device=str(place)) for place in ("cpu", device)]
    batches = [data.__getitems__([1, 5, 38, 0]) for data in sets]
    assert batches[1]["inputs"].device.type == device.type
    assert torch.equal(batches[0]["inputs"], batches[1]["inputs"].cpu())
    labels = [torch.cat([sample.gt_label.cpu() for sample in batch["data_samples"]]) for batch in batches]
    assert torch.equal(*labels)
    if device.type == "cuda":
        with pytest.raises(ValueError, match="nothing to pin"):
            batches[1].pin_memory()


@pytest.mark.parametrize("name", ["fastat_psi50", "psi30_early"])
def test_a_captured_run_trains_what_the_steps_train(device: torch.device, tmp_path: Path, name: str) -> None:
    """Captured and not, on the device; on the CPU there is no graph and the two are one."""
    cifar_run, cifar_full = (importlib.import_module(m) for m in ("cifar_run", "cifar_full"))
    spec = next(row for row in cifar_full.ROWS if row.name == name)
    row = cifar_run.Row(spec.name, spec.config)
    data = cifar_run.Data.load(importlib.import_module("toys").toy_cifar10(tmp_path, 32), str(device))
    ends = []
    for graph in (False, device.type == "cuda"):
        cfg = cifar_run.config_of(row)
        cifar_full.shorten(cfg)
        run = cifar_run.Run(row, 0, data, str(device), tmp_path / str(graph), cfg, graph, look_every=100)
        importlib.import_module("evidence").synchronize(device.type)
        with cifar_full.stream_of(device.type):
            for _ in run.work():
                pass
        ends.append((run.model.state_dict(), SimpleNamespace(**run.state.figures)))
    compare({k: v.float() for k, v in ends[0][0].items()}, {k: v.float() for k, v in ends[1][0].items()}, torch.float16)
    assert ends[0][1].macs_kept == ends[1][1].macs_kept
