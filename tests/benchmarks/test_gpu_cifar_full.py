"""The CIFAR runs of benchmarks/gpu: they train what the hooks train, resume, share a device and stop in time."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

from mmengine.runner import Runner


def module(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cifar10")


@pytest.fixture
def data(root: Path) -> Any:
    folder = module("toys").toy_cifar10(root, 8)
    return module("cifar_run").Data.load(folder, "cpu")


def row_of(name: str) -> Any:
    spec = next(row for row in module("cifar_full").ROWS if row.name == name)
    row = module("cifar_run").Row(spec.name, spec.config, spec.options, spec.clean_weight)
    return dataclasses.replace(row, control=spec.control)


def toy(name: str) -> Any:
    cfg = module("cifar_run").config_of(row_of(name))
    module("cifar_full").shorten(cfg)
    return cfg


def make(name: str, data: Any, folder: Path) -> Any:
    return module("cifar_run").Run(row_of(name), 0, data, "cpu", folder, toy(name), look_every=100)


def finish(run: Any) -> dict[str, torch.Tensor]:
    for _ in run.work():
        pass
    return run.model.state_dict()


@pytest.mark.parametrize("name", ["fastat_psi50", "psi30_early"])
def test_a_run_trains_what_the_hooks_train(name: str, data: Any, root: Path, tmp_path: Path) -> None:
    """Order, crops, attacks, Optimizer 2, freeze, slimming, learning rates: three epochs with a smaller last batch."""
    run = make(name, data, tmp_path)
    ours = finish(run)
    cfg = toy(name)
    cfg.work_dir, cfg.log_level, cfg.randomness = str(tmp_path / "work"), "ERROR", dict(seed=0)
    cfg.train_dataloader.dataset.data_root = str(root)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = (
        None
    )
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != "mmitp.CollapseGuardHook"]  # it only warns
    cfg.experiment_name = f"gpu_{name}"
    runner = Runner.from_cfg(cfg)
    theirs = runner.train().state_dict()
    assert runner.iter == 3 * run.length == 9
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.allclose(ours[key].double(), value.double(), rtol=1e-4, atol=1e-5), key
    assert run.state.figures["macs_kept"] < run.dense["macs"] // 2 + 1


@pytest.mark.parametrize(("name", "kept"), [("narrow30", 0.2977), ("narrow20", 0.1983), ("resnet56_narrow50", 0.4949)])
def test_a_control_is_counted_beside_the_full_width(name: str, kept: float, data: Any, tmp_path: Path) -> None:
    run = module("cifar_run").Run(row_of(name), 0, data, "cpu", tmp_path)
    assert module("measured").sizes(run.model)["macs"] / run.dense["macs"] == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize(("name", "after"), [("fastat_psi50_half", 1), ("psi30_early", 2)])
def test_a_run_that_was_stopped_ends_as_it_would_have(name: str, after: int, data: Any, tmp_path: Path) -> None:
    """In the window's front, and with the slimmed network."""
    whole = finish(make(name, data, tmp_path / "whole"))
    run = make(name, data, tmp_path)
    rests = (at_rest for at_rest in run.work() if at_rest)
    for _ in range(after):
        next(rests)
    run.save()
    again = make(name, data, tmp_path)
    assert again.state.epoch == after
    ended = finish(again)
    assert all(torch.equal(ended[key], value) for key, value in whole.items())
    known = json.loads(again.path.read_text())
    assert [entry["epoch"] for entry in known["curve"]] == [1, 2, 3]
    assert known["state"] == "finished"


def test_half_of_the_loss_is_taken_on_the_images_as_they_are(data: Any, tmp_path: Path) -> None:
    run = make("fastat_half", data, tmp_path)
    run.loss.zero_()
    batch = torch.arange(16)
    run.batches[16].copy_(torch.stack([batch, batch % 9, batch % 5, batch % 2]))
    images = run.train_set.cut(batch, batch % 9, batch % 5, batch % 2 > 0)
    x, labels = run._preprocessed(images), data.train.labels[batch]
    run.generator.manual_seed(3)
    attacked = run._attacked(x, labels)
    assert (attacked - x).abs().max() <= 8 * run.units.unit.max() * 1.0001
    with torch.no_grad():
        each = [torch.nn.functional.cross_entropy(run._logits(images), labels) for images in (attacked, x)]
    run.generator.manual_seed(3)
    run._step(16)
    assert float(run.loss) / 16 == pytest.approx(0.5 * float(each[0]) + 0.5 * float(each[1]), rel=1e-5)


def test_robustness_counts_images_that_withstand_every_restart(data: Any, tmp_path: Path) -> None:
    cifar_run = module("cifar_run")
    run = make("fastat", data, tmp_path)
    run.state.epoch = run.epochs
    run.model.eval()
    tried = iter([[0, 1, 2, 3, 4], [1, 2, 3]])  # images right after each restart, of those attacked
    labels = data.test.labels

    def pgd(x: torch.Tensor, y: torch.Tensor, attack: Any) -> torch.Tensor:
        seen.append(len(x))
        return x

    seen: list[int] = []
    clean = torch.ones(8, dtype=torch.bool)
    clean[7] = False  # wrong without any attack: not attacked
    run._right = lambda images, labels: clean.clone()
    run._pgd = pgd
    now: list[int] = []

    def logits(x: torch.Tensor) -> torch.Tensor:
        right = next(tried)
        chosen = now.pop(0)
        assert len(x) == len(chosen)
        out = torch.zeros(len(x), 10)
        for i, image in enumerate(chosen):
            out[i, (int(labels[image]) + (image not in right)) % 10] = 1
        return out

    now += [list(range(7)), [0, 1, 2, 3, 4]]  # type: ignore[list-item]
    run._logits = logits
    list(run._evaluate(cifar_run.Attack(1, 2)))
    assert seen == [7, 5]
    assert run.state.figures["pgd1x2"] == pytest.approx(100 * 3 / 8)


@pytest.mark.parametrize("name", ["fastat_psi50", "psi30_early"])
def test_a_captured_run_ends_as_the_other_one(
    name: str, data: Any, tmp_path: Path, captured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the captured operations runs in a replay: attack, training, Optimizer 2, and no wait in between."""
    graphed = module("graphed")
    monkeypatch.setattr(graphed, "WARM_UP", 1)
    replays: list[int] = []

    def capture(self: Any) -> Any:
        record = captured.Captured()  # unlike a stream in capture, it runs what it records
        with record:
            self.step()
        runs = iter([lambda: None])
        return SimpleNamespace(replay=lambda: (replays.append(1), next(runs, record.replay)()))

    monkeypatch.setattr(graphed.Graphed, "capture", capture)
    cfg, ends = toy(name), []
    cfg.train_dataloader.batch_size = 4
    cfg.train_dataloader.sampler.shuffle = True
    for graph in (False, True):
        row = row_of(name)
        run = module("cifar_run").Run(row, 0, data, "cpu", tmp_path / str(graph), cfg, graph, look_every=100)
        ends.append(finish(run))
        assert bool(replays) == graph
    assert len(replays) == 3 * 9  # all but the first step of three phases of ten steps
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())


# -- several runs at once


class Toy:
    """Three epochs of four steps."""

    def __init__(self, name: str, fails: bool = False, epoch: int = 0) -> None:
        self.name, self.fails, self.saved = name, fails, []
        self.state = SimpleNamespace(epoch=epoch, figures={}, beside=[])

    @property
    def finished(self) -> bool:
        return self.state.epoch == 3

    def work(self):
        while not self.finished:
            for step in range(4):
                if self.fails and step == 2:
                    raise RuntimeError("a bad day")
                log.append(self.name)
                yield False
            self.state.epoch += 1
            yield True

    def save(self) -> None:
        self.saved.append(self.state.epoch)


log: list[str] = []


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    log.clear()
    evidence = module("evidence")
    return evidence.Bench("runs", evidence.Evidence(tmp_path / "cifar_full.json"), "cpu", True, tmp_path, 1e12)


def makers(*runs: Toy) -> list[Any]:
    from functools import partial

    return [partial(lambda row, seed, run: run, SimpleNamespace(name=run.name), 0, run) for run in runs]


def test_runs_take_turns_and_the_next_begins_where_one_ends(bench: Any) -> None:
    a, b, c = Toy("a"), Toy("b", epoch=2), Toy("c")
    assert module("cifar_full").share(makers(a, b, c), 2, bench, SimpleNamespace(now=False)) == []
    assert "".join(log[:10]) == "abababab" + "ac"
    assert [run.saved for run in (a, b, c)] == [[3], [3], [3]]
    assert a.state.beside == [2, 2, 2]
    assert {name: run["state"] for name, run in bench.known("runs").items()} == dict.fromkeys("abc", "finished")


def test_told_to_stop_every_run_ends_its_epoch_and_is_saved(bench: Any) -> None:
    a, b, c = Toy("a"), Toy("b"), Toy("c")

    class Told:
        now = property(lambda self: len(log) >= 6)

    left = module("cifar_full").share(makers(a, b, c), 2, bench, Told())
    assert left == ["c_s0", "a", "b"]
    assert (a.saved, b.saved, c.saved) == ([1], [1], [])
    assert bench.known("runs")["a"] == dict(state="stopped", epoch=1)


def test_a_run_that_fails_costs_the_others_nothing(bench: Any) -> None:
    a, b = Toy("a", fails=True), Toy("b")
    with pytest.raises(RuntimeError, match="a: RuntimeError: a bad day"):
        module("cifar_full").share(makers(a, b), 2, bench, SimpleNamespace(now=False))
    assert b.saved == [3]
    assert bench.known("runs")["a"]["state"] == "failed"
    assert "a bad day" in bench.known("runs")["a"]["error"]


# -- graphs


def test_every_call_is_one_step_captured_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = module("graphed")
    steps: list[str] = []

    class Fake(graphed.Graphed):
        def capture(self) -> Any:
            steps.append("captured")
            return SimpleNamespace(replay=lambda: steps.append("replayed"))

    step = Fake(lambda: steps.append("step"))
    for key in [1] * 5 + [2] * 4:
        step(key)
    assert steps == [*["step"] * 3, "captured", *["replayed"] * 2, *["step"] * 3, "captured", "replayed"]
    steps.clear()
    eager = Fake(lambda: steps.append("step"), enabled=False)
    for _ in range(5):
        eager()
    assert steps == ["step"] * 5


def test_rows_name_configs_of_300_epochs_that_exist() -> None:
    cifar_run, names = module("cifar_run"), [row.name for row in module("cifar_full").ROWS]
    assert len(set(names)) == len(names)
    for name in names:
        cfg = cifar_run.config_of(row_of(name))
        assert cfg.train_cfg.max_epochs == 300
        wide, channels = name.endswith("wide"), cfg.model.backbone.get("base_channels", 16)
        if row_of(name).control:
            if name.startswith("narrow"):
                assert tuple(channels) == module("sweep").narrow_widths(int(name.removeprefix("narrow")) / 100)
            assert cfg.model.head.in_channels == channels[-1]
            assert "custom_hooks" not in cfg
        else:
            assert channels == (32 if wide else 16)
            assert cfg.model.head.in_channels == (128 if wide else 64)
        assert bool(row_of(name).clean_weight) == name.endswith("half")
    assert module("cifar_full").published("resnet20_cifar10_psi20_b50") == {
        "ops, paper": 0.17,
        "accuracy, paper": 88.17,
    }
    assert module("cifar_full").published("resnet20_cifar10_fastat_psi50")["PGD, paper"] == 40.14
    assert module("cifar_full").published("resnet20_cifar10_psi30_early") == {}
    assert cifar_run.window_of((1 / 15, 1 / 3), 300) == (20, 100)
    assert cifar_run.window_of((20, 240), 300) == (20, 240)
