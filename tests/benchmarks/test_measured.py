"""A measured run: its metrics file, its resume, the structures drawn at random, the recorded command."""

import argparse
import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmpretrain")
from mmengine.hooks import EMAHook, Hook

CONFIGS = Path(__file__).parents[2] / "configs/cifar10"


@pytest.fixture
def measured() -> Any:
    return importlib.import_module("measured")


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("cifar10")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    return root


def arguments(root: Path, work_dir: Path, **more: Any) -> argparse.Namespace:
    options = ["train_dataloader.batch_size=10", "model.backbone.depth=8"]
    settings = dict(
        config=str(CONFIGS / "resnet20_cifar10_short.py"),
        seed=0,
        work_dir=str(work_dir),
        metrics=None,
        data_root=str(root),
        batches=2,
        cfg_options=options,
        epochs=3,
        times=1,
        random_structure=None,
        narrow=None,
        start=None,
    )
    return argparse.Namespace(**{**settings, **more})


class Killed(Exception):
    pass


def test_a_stopped_run_ends_as_it_would_have_in_one_piece(
    measured: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.train(arguments(root, tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole/metrics.json").read_text())

    class Kill(Hook):
        """Right after the second epoch's checkpoint, before its validation."""

        priority = "LOWEST"

        def after_train_epoch(self, runner: Any) -> None:
            if runner.epoch == 1:
                raise Killed

    build = measured.build_runner
    with monkeypatch.context() as patch:
        patch.setattr(measured, "build_runner", lambda cfg: (r := build(cfg)).register_hook(Kill()) or r)
        with pytest.raises(Killed):
            measured.train(arguments(root, tmp_path / "parts"))
    halfway = json.loads((tmp_path / "parts/metrics.json").read_text())
    assert halfway["state"] == "running"
    assert [entry["epoch"] for entry in halfway["epochs"]] == [1, 2]
    measured.train(arguments(root, tmp_path / "parts"))
    parts = json.loads((tmp_path / "parts/metrics.json").read_text())

    assert (whole["state"], whole["resumed"]) == ("finished", 0)
    assert (parts["state"], parts["resumed"]) == ("finished", 1)
    assert [entry["epoch"] for entry in parts["epochs"]] == [1, 2, 3]
    assert parts["accuracy"] == whole["accuracy"]
    assert parts["epochs"][0]["accuracy"] == whole["epochs"][0]["accuracy"]
    assert parts["iterations"] == whole["iterations"] == 6
    assert parts["epochs"][0]["train_seconds"] == halfway["epochs"][0]["train_seconds"]
    weights = [torch.load(tmp_path / n / "weights.pth", weights_only=True) for n in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    with pytest.raises(ValueError, match="checkpoints of another run"):
        measured.train(arguments(root, tmp_path / "parts", epochs=4))


def test_a_run_leaves_the_weights_that_were_validated(
    measured: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = measured.build_runner
    average = EMAHook(momentum=0.3)
    monkeypatch.setattr(measured, "build_runner", lambda cfg: (r := build(cfg)).register_hook(average) or r)
    measured.train(arguments(root, tmp_path))
    left = torch.load(tmp_path / "weights.pth", weights_only=True)
    # Checkpoints hold the average as their model, and what was trained apart.
    saved = torch.load(tmp_path / "epoch_3.pth", weights_only=False)
    torch.testing.assert_close(left, saved["state_dict"], rtol=0, atol=0)
    assert not torch.equal(left["head.fc.weight"], saved["ema_state_dict"]["module.head.fc.weight"])


def test_weights_to_start_from_are_no_checkpoint_of_the_run(measured: Any, root: Path, tmp_path: Path) -> None:
    measured.train(arguments(root, tmp_path / "first"))
    args = arguments(
        root,
        tmp_path / "second",
        cfg_options=[*arguments(root, tmp_path).cfg_options, "optim_wrapper.optimizer.lr=0.0"],
    )
    cfg = measured.configured(args, args.config)
    cfg.param_scheduler = []
    cfg.optim_wrapper.optimizer.weight_decay = 0.0
    assert measured.start_from(cfg, None) == {}
    assert measured.start_from(cfg, str(tmp_path / "first/weights.pth")) == dict(start="first")
    measured.measured_run(cfg, measured.metrics_file(args, cfg), measured.head_of(args, cfg, args.config))
    first, second = (torch.load(tmp_path / n / "weights.pth", weights_only=True) for n in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first if name.endswith("conv1.weight"))
    head = measured.head_of(args, cfg, args.config) | measured.start_from(cfg, str(tmp_path / "other/weights.pth"))
    cfg.load_from, cfg.resume = None, True
    with pytest.raises(ValueError, match="checkpoints of another run"):  # which began with other weights
        measured.measured_run(cfg, measured.metrics_file(args, cfg), head)


def test_data_is_loaded_in_the_process_whose_time_is_taken(measured: Any, root: Path, tmp_path: Path) -> None:
    config = str(CONFIGS / "resnet20_cifar10_stock_short.py")
    cfg = measured.configured(arguments(root, tmp_path, batches=None, cfg_options=[]), config)
    assert (cfg.train_dataloader.num_workers, cfg.train_dataloader.persistent_workers) == (0, False)


def test_the_index_averages_runs_of_a_configs_own_length_alone(
    measured: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch-Pruning's dense phase is the dense config in 7 epochs: no result of that config."""
    monkeypatch.setattr(measured, "measured_run", lambda cfg, path, head: head)
    for name, epochs in (("dense_s0", None), ("tp_dense7_s0", 7)):
        path = tmp_path / f"{name}.json"
        measured.train(arguments(root, tmp_path / "run", metrics=str(path), epochs=epochs, cfg_options=[]))
        path.write_text(json.dumps(dict(json.loads(path.read_text()), accuracy=50.0 if epochs else 90.0)))
    results = importlib.import_module("metafiles").sweep_results(tmp_path)
    assert results == {"resnet20_cifar10_short": {"Top 1 Accuracy": 90.0, "seeds": 1}}


def test_a_control_is_trained_from_the_same_weights_cut_narrower(
    measured: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(root, tmp_path / "run", metrics=str(tmp_path / "run.json"), narrow=0.5)
    cfg = measured.configured(args, args.config)
    dense = measured.MODELS.build(cfg.model)
    block = dense.backbone.layer1[0]
    block.bn1.weight.data = torch.arange(16.0)  # by which channels are told
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    args.start = str(tmp_path / "dense.pth")
    monkeypatch.setattr(measured, "step_cost", lambda *_: dict(median=0.6))
    runs = []
    monkeypatch.setattr(measured, "measured_run", lambda *given: runs.append(given) or {})
    measured.train(args)
    ((cfg, _, head),) = runs
    assert (head["start"], head["narrow"], head["relative_cost"]) == ("dense", 0.5, 0.18)
    narrow = measured.MODELS.build(cfg.model)
    assert 0.4 < measured.sizes(narrow)["macs"] / measured.sizes(dense)["macs"] <= 0.5
    narrow.load_state_dict(torch.load(cfg.load_from, weights_only=True)["state_dict"])
    inner = narrow.backbone.layer1[0].bn1.weight.detach()
    assert 8 < len(inner) < 16
    assert torch.equal(inner, block.conv2.weight.abs().sum((0, 2, 3)).topk(len(inner)).indices.sort().values.float())


def test_a_random_structure_meets_the_operations_and_is_the_seeds_own(
    measured: Any, root: Path, tmp_path: Path
) -> None:
    cfg = measured.configured(arguments(root, tmp_path), str(CONFIGS / "resnet20_cifar10_short.py"))
    cfg.model.backbone.depth = 20
    drawn = [measured.random_structure(cfg, 0.3, seed) for seed in (0, 0, 1)]
    assert drawn[0]["widths"] == drawn[1]["widths"] != drawn[2]["widths"]
    for structure in drawn[1:]:
        widths = structure["widths"]
        shares = [w / n for w, n in zip(widths, [16] * 3 + [32] * 3 + [64] * 3, strict=True)]
        assert max(shares) > 2 * min(shares)
        model = dict(measured.dense_model(cfg), type="mmitp.SlimModel", of="mmpretrain.ImageClassifier")
        small = measured.MODELS.build(dict(model, slim=structure["spec"]))
        # stem 442,368, classifier 640; a channel between two convolutions of a stage, by hand
        price = [1024 * 9 * 32] * 3 + [256 * 9 * (16 + 32)] + [256 * 9 * 64] * 2 + [64 * 9 * 96] + [64 * 9 * 128] * 2
        macs = 442_368 + 640 + sum(w * p for w, p in zip(widths, price, strict=True))
        assert measured.sizes(small)["macs"] == macs
        assert 0.29 * 40_551_040 < macs <= 0.3 * 40_551_040


def test_the_channels_that_a_network_reads_and_computes_are_noted(measured: Any, root: Path, tmp_path: Path) -> None:
    """ResNet-8 with masks of single layers: in the second block the convolution between 32 and 64 channels reads 8."""
    args = arguments(root, tmp_path, cfg_options=["model.backbone.depth=8"])
    cfg = measured.configured(args, str(CONFIGS / "resnet20_cifar10_psi30_short.py"))
    measured.init_default_scope("mmpretrain")
    model = measured.MODELS.build(cfg.model)
    layers = measured.masked_layers(model)
    layers["backbone.layer2.0.conv2"].prune_mask.data[8:] = -1
    layers["backbone.layer3.0.conv1"].prune_mask.data[:12] = -1
    noted = measured.channels(model)
    assert [*noted] == [
        "backbone.conv1",
        *(f"backbone.layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)),
        "head.fc",
    ]
    # conv1 of the second block computes what conv2 reads; the third block reads 20 of a stream that adds hold together
    assert noted["backbone.layer2.0.conv1"] == [16, 8]
    assert noted["backbone.layer2.0.conv2"] == [8, 32]
    assert noted["backbone.layer3.0.conv1"] == [20, 64]
    assert noted["head.fc"] == [64, 10]
    measured.train(arguments(root, tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text())["channels"]["backbone.layer2.0.conv1"] == [16, 32]


def test_a_recorded_command_names_no_folder_of_the_machine(measured: Any) -> None:
    argv = ["/home/me/benchmarks/x.py", "c.py", "--work-dir", "/a/b", "--seed", "1", "--dense-metrics", "/a/out/d.json"]
    assert measured.recorded_command(argv) == "python benchmarks/x.py c.py --seed 1 --dense-metrics out/d.json"


def test_brackets_in_an_option_are_written_as_they_are(tmp_path: Path) -> None:
    content = {"options": ["a=['x']", 'b=[1,2] \\ "{"'], "epochs": [{"epoch": 1, "ratio": [1, 2]}, {"epoch": 2}]}
    importlib.import_module("records").write_json(tmp_path / "run.json", content)
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text) == content
    assert text.splitlines()[1:3] == [f' "options": {json.dumps(content["options"])},', ' "epochs": [']
    assert text.splitlines()[-3] == '  {"epoch": 2}'


def test_full_width_is_what_ratios_refer_to(measured: Any, root: Path, tmp_path: Path) -> None:
    for name in ("narrow30", "psi30"):
        args = arguments(root, tmp_path, cfg_options=[])
        cfg = measured.configured(args, str(CONFIGS / f"resnet20_cifar10_{name}_short.py"))
        assert measured.dense_sizes(cfg) == dict(macs=40_551_040, params=269_722)


def test_the_dense_model_has_its_preprocessor_wherever_the_config_keeps_it(measured: Any) -> None:
    from mmengine import Config

    inside = Config(dict(model=dict(type="mmitp.MaskedModel", of="a.Net", prune={}, data_preprocessor=dict(mean=[1]))))
    beside = Config(dict(model=dict(type="a.Net"), data_preprocessor=dict(mean=[1])))
    for cfg in (inside, beside):
        assert measured.dense_model(cfg) == dict(type="a.Net", data_preprocessor=dict(mean=[1]))


def test_a_longer_run_is_the_whole_cycle_with_its_window(
    measured: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 epochs three times over: 54, with the peak of the rate and the window three times as late."""
    seen = []
    monkeypatch.setattr(measured, "measured_run", lambda cfg, path, head: seen.append((cfg, head)) or {})
    config = str(CONFIGS / "resnet20_cifar10_psi30_brief_short.py")
    measured.train(arguments(root, tmp_path, config=config, epochs=None, times=3, cfg_options=[]))
    cfg, head = seen[0]
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[0]["total_steps"], head["times"]) == (54, 54, 3)
    assert cfg.param_scheduler[2]["begin"] == pytest.approx(16.2)
    hook = cfg.custom_hooks[0]
    assert (hook.begin * 54, hook.end * 54) == pytest.approx((0.75, 2.25))
