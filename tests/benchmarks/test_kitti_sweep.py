"""A measured detector run on generated frames, and the table of KITTI-1348 made of such runs' metrics."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet")
from mmengine import Config
from mmengine.registry import MODELS

from mmitp.datasets.scenes import write_scenes
from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.engine.narrow import narrow_control
from mmitp.pruning.check import counted_macs

CONFIGS = Path(__file__).parents[2] / "configs/kitti"
DENSE = "centernet_dla34x025_kitti1348_short"


@pytest.fixture
def driver() -> Any:
    return importlib.import_module("kitti_sweep")


def test_a_measured_detector_run_is_slimmed_and_judged_with_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector_run = importlib.import_module("detector_run")
    root = write_scenes(tmp_path / "scenes", 6, seed=1, size=(192, 64), val_fraction=0.34)
    parts = [f"{part}_dataloader.dataset.data_root={root}" for part in ("train", "val", "test")]
    args = argparse.Namespace(
        config=str(CONFIGS / f"{DENSE}_prune50_robust.py"),  # an attack hangs on the preprocessor
        dense=str(CONFIGS / f"{DENSE}.py"),
        shape=(160, 512),
        seed=0,
        start=None,
        work_dir=str(tmp_path / "run"),
        metrics=str(tmp_path / "run.json"),
        data_root=None,
        batches=None,
        cfg_options=[
            *parts,
            f"val_evaluator.data_root={root}",
            f"test_evaluator.data_root={root}",
            "train_cfg.max_epochs=2",
            "train_cfg.val_interval=2",
            "param_scheduler=[]",
            "custom_hooks.0.begin=0",
            "custom_hooks.0.end=1",
            "visualizer.name=kitti_sweep",  # mmengine keeps visualizers by name, and an earlier one writes elsewhere
        ],
    )
    detector_run.train(args)
    known = json.loads((tmp_path / "run.json").read_text())
    assert known["state"] == "finished"
    assert known["macs_dense"] == 634_142_720
    assert known["macs"] <= 317_071_360
    assert known["epochs"][0]["ap"] is None  # not validated
    assert known["epochs"][1]["ap"] == known["ap"]
    assert len(list((tmp_path / "run/results").glob("*.txt"))) == 2
    evaluated = [ap for ap in known["figures"].values() if ap is not None]
    assert all(len(ap["R40_interval"]) == 3 for ap in evaluated)

    sweep = importlib.import_module("sweep")
    run = sweep.Run("run", "pruned", 0.5, 0, "detector_run.py", (), f"{DENSE}_prune50_robust")
    sweep.latency(sweep.Sweep([run], tmp_path, tmp_path, configs=CONFIGS), [run], 3, DENSE, (160, 512))
    latency = json.loads((tmp_path / "run.json").read_text())["latency"]
    low, middle, high = latency["ratio"]
    assert 0 < low <= middle <= high
    assert min(latency["ms"], latency["dense_ms"]) > 0

    kitti_sweep = importlib.import_module("kitti_sweep")
    kitti_sweep.publish(sweep.Sweep([run], tmp_path, tmp_path, configs=CONFIGS), [run], tmp_path / "published")
    cfg = load_config(str(tmp_path / "published/run.py"))
    published = MODELS.build(cfg.model).eval()
    assert counted_macs(published, blank_example(published, (160, 512))) == known["macs"]
    halves = torch.load(tmp_path / "published/run.pth", weights_only=True)["state_dict"]
    assert {v.dtype for v in halves.values() if v.is_floating_point()} == {torch.float16}
    x = torch.randn(1, 3, 160, 512, generator=torch.Generator().manual_seed(0))
    maps = []
    for state in (halves, torch.load(tmp_path / "run/weights.pth", weights_only=True)):
        published.load_state_dict(state)
        with torch.no_grad():
            maps.append(published(x)[0][0])
    torch.testing.assert_close(*maps, rtol=0.02, atol=0.02)

    kitti_sweep.fit(sweep.Sweep([run], tmp_path, tmp_path, configs=CONFIGS), [run])
    seen = json.loads((tmp_path / "run.json").read_text())["training_frames"]
    assert list(seen) == ["Car", "Pedestrian", "Cyclist"]

    monkeypatch.setattr(kitti_sweep, "ATTACKS", ((1, 2.0), (2, 4.0)))
    monkeypatch.setattr(kitti_sweep, "IMAGES", 1)
    monkeypatch.setattr(kitti_sweep, "ROOT", root.parent)
    monkeypatch.setattr(kitti_sweep, "LABELS", f"{root.name}/training/label_2")
    sweeping = sweep.Sweep([run], tmp_path, tmp_path, configs=CONFIGS)
    kitti_sweep.robust(sweeping, [run], 1)
    tested = json.loads((tmp_path / "run.json").read_text())["robust"]
    assert list(tested) == ["images", "clean", "PGD-1 eps 2", "PGD-2 eps 4"]
    assert tested["images"] == 1
    assert str(tmp_path) not in json.dumps(tested)  # no folder of the machine
    assert [tested[name]["largest_change"] for name in list(tested)[1:]] == pytest.approx([0, 2, 4], abs=0.01)
    (frame,) = (tmp_path / "run/attacked_1/frames.txt").read_text().split()
    for name in list(tested)[1:]:
        assert [p.name for p in (tmp_path / "run/attacked_1" / name).iterdir()] == [f"{frame}.txt"]
    row = kitti_sweep.robust_table([run], tmp_path).splitlines()[2]
    assert row.startswith("| pruned | 0 | 1 | Car |")
    assert row.count("|") == 8
    kitti_sweep.robust(sweeping, [run], 1)  # nothing is left to do
    assert json.loads((tmp_path / "run.json").read_text())["robust"] == tested
    kitti_sweep.robust(sweeping, [run], 2, ["PGD-1 eps 2"])  # on more images: beside those
    known = json.loads((tmp_path / "run.json").read_text())
    assert known["robust"] == tested
    assert list(known["robust_2"]) == ["images", "clean", "PGD-1 eps 2"]
    rows = kitti_sweep.robust_table([run], tmp_path).splitlines()[2:]
    assert [cells.split(" | ")[1:4] for cells in rows[::3]] == [["0", "1", "Car"], ["0", "2", "Car"]]
    assert rows[3].endswith("not tested |")
    assert kitti_sweep.robust_table([run], tmp_path / "none") == "Not tested yet.\n"


def test_rtmdet_starts_from_another_runs_average_and_is_tested_with_its_own(
    driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector_run, sweep = importlib.import_module("detector_run"), importlib.import_module("sweep")
    run = driver.run_of("rtmdet_prune50_fisher", 0)
    start = next(first for first in driver.declared() if first.name == run.needs)
    root = write_scenes(tmp_path / "scenes", 8, seed=1, size=(192, 64), val_fraction=0.5)
    monkeypatch.setattr(driver, "ROOT", tmp_path)
    monkeypatch.setattr(driver, "LABELS", "scenes/training/label_2")
    monkeypatch.setattr(driver, "ATTACKS", ((1, 2.0),))
    places = [f"{part}_dataloader.dataset.data_root={root}" for part in ("train", "val", "test")]
    places += [f"{part}_evaluator.data_root={root}" for part in ("val", "test")]

    def train(run: Any, *options: str) -> None:
        words = [word.format(work=tmp_path) for word in run.args]
        words = [str(CONFIGS.parents[1] / word) if word.startswith("configs/") else word for word in words]
        words += ["--work-dir", str(tmp_path / run.name), "--metrics", str(tmp_path / f"{run.name}.json")]
        options = (*places, "param_scheduler=[]", "custom_hooks.1.switch_epoch=1", *options)
        options += (f"visualizer.name={run.name}", "train_cfg.max_epochs=2", "train_cfg.val_interval=2")
        monkeypatch.setattr("sys.argv", ["detector_run.py", *words, "--cfg-options", *options])
        detector_run.main()

    train(start)
    train(run, "custom_hooks.2.begin=0", "custom_hooks.2.end=1")
    known = json.loads((tmp_path / f"{run.name}.json").read_text())
    assert (known["start"], known["macs_dense"]) == (start.name, 1_594_955_520)
    assert known["macs"] <= known["macs_dense"] // 2

    config_of = driver.config_of

    def at_toys(sweeping: Any, run: Any, folder: str) -> Any:
        cfg = config_of(sweeping, run, folder)
        cfg.merge_from_dict(dict(place.split("=") for place in places))
        return cfg

    monkeypatch.setattr(driver, "config_of", at_toys)
    monkeypatch.setattr(driver, "IMAGES", 1)
    sweeping = sweep.Sweep([start, run], tmp_path, tmp_path, configs=CONFIGS, figure="ap")
    driver.robust(sweeping, [run], 1)
    assert list(json.loads((tmp_path / f"{run.name}.json").read_text())["robust"]) == ["images", "clean", "PGD-1 eps 2"]
    driver.publish(sweeping, [start, run], tmp_path / "published")
    assert not (tmp_path / "published").exists()  # too large


def figures(ap: float) -> dict[str, Any]:
    rule = {"R40": [ap + 9, ap, ap - 9], "R40_interval": [[ap + i - 1, ap + i + 1] for i in (9, 0, -9)]}
    return {"Car": rule, "Pedestrian": None, "Cyclist": rule}


def test_the_front_pages_figure_is_the_mean_over_all_classes(driver: Any) -> None:
    assert driver.mean_ap(dict(figures=figures(30.0))) == 20.0  # two classes of 30, one without detections


def test_the_table_holds_finished_runs_with_intervals_and_differences(driver: Any, tmp_path: Path) -> None:
    def write(name: str, config: str, **more: Any) -> None:
        known = dict(state="finished", config=config, ops_kept=0.4983, params_kept=0.5, train_seconds=5400.4)
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(known, **more)))

    assert "No run" in driver.table(driver.declared(), tmp_path)
    timed = dict(ms=40.0, dense_ms=50.0, ratio=[0.78, 0.8, 0.83])
    write("prune50_s0", f"{DENSE}_prune50", figures=figures(29.0), minus_dense=figures(-1.0), latency=timed)
    write("dense_s0", DENSE, figures=figures(30.0), ops_kept=1.0, params_kept=1.0)
    write("dense_s1", DENSE, figures=figures(31.0), state="running")
    (tmp_path / "costs.json").write_text(
        json.dumps(
            {
                f"{DENSE}_prune50": dict(
                    window=dict(median=1.1),
                    slimmed=dict(median=0.8),
                    epochs=dict(window=18, slimmed=34),
                    dense_epochs=48,
                )
            }
        )
    )
    dense, pruned = driver.table(driver.declared(), tmp_path).splitlines()[2:]
    cells = [cell.strip() for cell in dense.strip("|").split("|")]
    assert cells[1:8] == ["0", "30.00 (29.00 to 31.00)", "-", "30.00 (29.00 to 31.00)", "-", "-", "-"]
    assert cells[8:] == ["1", "1", "-", "1.00", "5,400"]
    cells = [cell.strip() for cell in pruned.strip("|").split("|")]
    assert cells[2:5] == ["29.00 (28.00 to 30.00)", "-", "29.00 (28.00 to 30.00)"]
    assert cells[5:8] == ["-1.00 (-2.00 to +0.00)", "-", "-1.00 (-2.00 to +0.00)"]
    assert cells[8:] == ["0.4983", "0.5", "40.0 (0.80)", "0.98", "5,400"]

    write("prune50_s0", f"{DENSE}_prune50", figures=figures(29.0), minus_control=figures(2.0))
    *_, header, _, row = driver.table(driver.declared(), tmp_path).splitlines()
    assert "minus the control" in header
    assert row.endswith("| 0 | +2.00 (+1.00 to +3.00) | - | +2.00 (+1.00 to +3.00) |")


def test_a_pruned_run_is_compared_with_the_dense_one_and_its_control(
    driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = importlib.import_module("sweep")
    runs = [driver.run_of(name, seed) for name, seed in (("dense", 0), ("prune50", 0), ("narrow50", 0), ("prune50", 1))]
    for run in runs:
        (tmp_path / run.name / "results").mkdir(parents=True)
        (tmp_path / f"{run.name}.json").write_text(json.dumps(dict(state="finished", config=run.config)))
    asked = []

    def evaluate(words: list[str]) -> None:
        loose = 20 if "--overlap" in words else 0
        if "--versus" in words and not loose:
            asked.append((Path(words[1]).parent.name, Path(words[words.index("--versus") + 1]).parent.name))
        out = Path(words[words.index("--out") + 1])
        out.write_text(json.dumps(dict(figures(50 + loose), difference=figures(len(asked) + loose))))

    monkeypatch.setattr("mmitp.commands.eval_kitti.main", evaluate)
    driver.compare(sweep.Sweep(runs, tmp_path, tmp_path, configs=CONFIGS, figure="ap"), runs[:0])
    assert asked == []
    (tmp_path / "dense_s0.json").write_text(json.dumps(dict(state="running", config=runs[0].config)))
    driver.compare(sweep.Sweep(runs, tmp_path, tmp_path, configs=CONFIGS, figure="ap"), runs)
    assert asked == [("prune50_s0", "narrow50_s0")]  # validated on the way, but not trained to its end
    asked.clear()
    (tmp_path / "dense_s0.json").write_text(json.dumps(dict(state="finished", config=runs[0].config)))
    driver.compare(sweep.Sweep(runs, tmp_path, tmp_path, configs=CONFIGS, figure="ap"), runs)
    assert asked == [("prune50_s0", "dense_s0"), ("prune50_s0", "narrow50_s0"), ("narrow50_s0", "dense_s0")]
    asked.clear()
    started = [driver.run_of(f"started_{name}", 0) for name in ("dense", "prune50", "narrow50")]
    for run in (*started, driver.start_of(driver.CENTERNET, "")):
        (tmp_path / run.name / "results").mkdir(parents=True)
        (tmp_path / f"{run.name}.json").write_text(json.dumps(dict(state="finished", config=run.config)))
    all_ = [*started, driver.start_of(driver.CENTERNET, "")]
    driver.compare(sweep.Sweep(all_, tmp_path, tmp_path, configs=CONFIGS, figure="ap"), all_)
    assert set(asked) == {
        ("started_prune50_s0", "started_dense_s0"),
        ("started_prune50_s0", "started_narrow50_s0"),
        ("started_narrow50_s0", "started_dense_s0"),
    }
    asked.clear()
    narrowed = driver.run_of("started_uniform50", 0)
    (tmp_path / narrowed.name / "results").mkdir(parents=True)
    (tmp_path / f"{narrowed.name}.json").write_text(json.dumps(dict(state="finished", config=narrowed.config)))
    shutil.rmtree(tmp_path / "started_dense_s0/results")
    before = json.loads((tmp_path / "started_prune50_s0.json").read_text())
    again = [*started, narrowed]
    driver.compare(sweep.Sweep(again, tmp_path, tmp_path, configs=CONFIGS, figure="ap"), again)
    assert ("started_prune50_s0", "started_uniform50_s0") in asked
    after = json.loads((tmp_path / "started_prune50_s0.json").read_text())
    # what was compared with the dense network stays, though its detections are gone
    assert after["minus_dense"] == before["minus_dense"]
    assert after["loose"]["minus_dense"] == before["loose"]["minus_dense"]
    assert after["minus_narrowed"] is not None
    give_figures(tmp_path, "started_prune50_s0")
    table = driver.table(started[1:2], tmp_path)
    assert "| minus the same start made narrower, of the same seed | seed | Car |" in table
    asked.clear()
    others = [driver.run_of(f"rtmdet_{name}", 0) for name in ("dense", "prune50_fisher", "narrow50")]
    for run in others:
        (tmp_path / run.name / "results").mkdir(parents=True)
        (tmp_path / f"{run.name}.json").write_text(json.dumps(dict(state="finished", config=run.config)))
    driver.compare(sweep.Sweep(others, tmp_path, tmp_path, configs=CONFIGS, figure="ap"), others)
    assert set(asked) == {
        ("rtmdet_prune50_fisher_s0", "rtmdet_dense_s0"),
        ("rtmdet_prune50_fisher_s0", "rtmdet_narrow50_s0"),
        ("rtmdet_narrow50_s0", "rtmdet_dense_s0"),
    }
    pruned = json.loads((tmp_path / "prune50_s0.json").read_text())
    assert [pruned[key]["Car"]["R40"][1] for key in ("minus_dense", "minus_control")] == [1, 2]
    assert [pruned["loose"][key]["R40"][1] for key in ("Car", "minus_dense", "minus_control")] == [70, 21, 22]
    give_figures(tmp_path, "dense_s0", "prune50_s0")
    lines = driver.table(runs[:2], tmp_path).splitlines()
    assert "at an overlap of 0.5" in lines[5]
    dense, pruned_row = (line.split(" | ") for line in lines[7:9])
    assert dense[2:] == ["70.00 (69.00 to 71.00)", "-", "-", "71.50 |"]
    changes = ["+21.00 (+20.00 to +22.00)", "+22.00 (+21.00 to +23.00)"]
    assert pruned_row[2:] == ["70.00 (69.00 to 71.00)", *changes, "71.50 |"]


def give_figures(folder: Path, *names: str) -> None:
    for name in names:
        known = json.loads((folder / f"{name}.json").read_text())
        known.update(
            figures=figures(30.0), training_frames=dict(Car=71.5), ops_kept=0.5, params_kept=0.5, train_seconds=1.0
        )
        (folder / f"{name}.json").write_text(json.dumps(known))


@pytest.mark.parametrize("config", sorted((CONFIGS / "weights").glob("*.py")), ids=lambda path: path.stem)
def test_published_weights_fill_a_network_of_the_measured_size(config: Path) -> None:
    model = MODELS.build(load_config(str(config)).model).eval()
    model.load_state_dict(torch.load(config.with_suffix(".pth"), weights_only=True)["state_dict"])
    run = config.stem.replace("start_uniform50", "started_uniform50")  # no training of its own: start_s0, cut
    measured = json.loads((CONFIGS / f"metrics/{run}.json").read_text())
    assert counted_macs(model, blank_example(model, (160, 512))) == measured["macs"]
    assert sum(p.numel() for p in model.parameters()) == measured["params"]


def test_the_narrow_start_is_what_the_command_writes(tmp_path: Path) -> None:
    pruned = load_config(str(CONFIGS / "centernet_dla34x025_kitti1348_short_prune50_fisher.py"))
    start, committed = CONFIGS / "weights/start_s0.pth", CONFIGS / "weights/start_uniform50_s0.pth"
    report = narrow_control(pruned, str(tmp_path), weights=str(start), shape=(160, 512))
    written = Config.fromfile(report.config)
    assert written.model.slim == load_config(str(committed.with_suffix(".py"))).model.slim
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in (written.load_from, committed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value.to(theirs[name].dtype), theirs[name]) for name, value in ours.items())


def test_a_run_starts_from_published_weights_and_resumes_from_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Any
) -> None:
    detector_run = importlib.import_module("detector_run")
    seen = []
    measured = importlib.import_module("measured")
    monkeypatch.setattr(detector_run, "measured_run", lambda cfg, path, head, **_: seen.append((cfg, head)) or {})
    monkeypatch.setattr(detector_run, "kitti_intervals", lambda *_: {})
    run = driver.run_of("started_prune50", 1)
    start = run.args[run.args.index("--start") + 1]
    for newest in (None, "epoch_3.pth"):
        monkeypatch.setattr(measured, "newest_good", lambda cfg, newest=newest: newest)
        words = [*run.args, "--work-dir", str(tmp_path), "--seed", "1"]
        monkeypatch.setattr("sys.argv", ["detector_run.py", *words])
        monkeypatch.chdir(driver.ROOT)
        detector_run.main()
    (first, head), (again, _) = seen
    assert (first.load_from, first.resume) == (start, False) == ("configs/kitti/weights/start_s0.pth", False)
    assert (again.load_from, again.resume) == (None, True)
    assert (head["start"], head["seed"]) == ("start_s0", 1)
    control = driver.run_of("started_narrow50", 0)
    assert control.args[-1] == "configs/kitti/weights/start_narrow50_s0.pth"


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("prune50", "dense"),
        ("started_prune50_fisher", "started_dense"),
        ("started_robust", "started_dense"),
        ("started_prune50_robust", "started_robust"),
        ("started_prune50_robust4", "started_robust"),
        ("prune50_robust", "robust"),
        ("rtmdet_narrow50", "rtmdet_dense"),
    ],
)
def test_a_run_has_its_dense_one(driver: Any, name: str, dense: str) -> None:
    assert driver.dense_of(name) == dense
    assert dense in driver.ROWS


def test_rtmdets_rows_start_from_a_training_that_they_need(driver: Any) -> None:
    runs = {run.name: run for run in driver.declared()}
    assert runs["rtmdet_prune50_fisher_s0"].args[-2:] == ("--start", "{work}/start_rtmdet_s0/weights.pth")
    assert runs["rtmdet_narrow50_s0"].args[-1] == "{work}/start_rtmdet_narrow50_s0/weights.pth"
    for run in runs.values():
        if "rtmdet" in run.name:
            assert run.config.startswith("rtmdet_tiny_")
            assert run.needs is None or run.needs in runs


def test_every_declared_run_has_its_config(driver: Any) -> None:
    assert not [run.name for run in driver.declared() if not (driver.CONFIGS / f"{run.config}.py").is_file()]


def test_the_readme_holds_what_the_metrics_files_say(driver: Any) -> None:
    text = driver.README.read_text(encoding="utf-8")
    new = driver.table(driver.declared(), driver.METRICS)
    assert importlib.import_module("sweep").with_tables(text, new, driver.BEGIN, driver.END) == text
