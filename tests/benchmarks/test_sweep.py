"""The sweep's table of runs, its driver on toy scripts, and the tables from metrics files."""

import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmitp.engine.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep() -> Any:
    return importlib.import_module("sweep")


# -- what is declared


def test_the_narrow_networks_operations_are_those_derived_by_hand(sweep: Any) -> None:
    assert sweep.macs_of((16, 32, 64)) == 40_551_040
    # 9 * (1024 * (3 * 9 + 6 * 81) + 256 * (9 * 17 + 5 * 289) + 64 * (17 * 34 + 5 * 34 * 34)) + 340
    assert sweep.macs_of((9, 17, 34)) == 9 * (1024 * 513 + 256 * 1598 + 64 * 6358) + 340 == 12_072_148


@pytest.mark.parametrize(("percent", "widths"), [(50, (11, 23, 45)), (30, (9, 17, 34)), (15, (6, 12, 25))])
def test_a_control_is_the_nearest_uniform_network_trained_for_the_dense_networks_time(
    sweep: Any, percent: int, widths: tuple[int, int, int]
) -> None:
    assert sweep.narrow_widths(percent / 100) == widths
    assert percent / 100 * 0.97 < sweep.macs_of(widths) / 40_551_040 <= percent / 100
    name = f"resnet20_cifar10_narrow{percent}_short"
    control, dense = (load_config(str(ROOT / f"configs/cifar10/{n}.py")) for n in (name, sweep.DENSE))
    assert tuple(control.model.backbone.base_channels) == widths
    assert control.model.head.in_channels == widths[-1]
    epochs = control.train_cfg.max_epochs
    costs = sweep.read(sweep.METRICS, "costs")
    _, measured = sweep.step_medians(costs[name], "step")
    then = measured[: costs[name].get("length_from")]  # a finished run's length does not follow later measurements
    assert epochs == round(sweep.DENSE_EPOCHS / statistics.median(then))
    cost, default = (sweep.whole_run(costs[n]) for n in (name, f"resnet20_cifar10_psi{percent}_brief_short"))
    assert cost > default - 0.03  # the default has no longer run, up to what steps' measurements differ by
    for ours, whole in zip(control.param_scheduler, dense.param_scheduler, strict=True):
        lengths = {key: value * epochs / 10 for key, value in whole.items() if key in ("total_steps", "begin", "end")}
        assert {key: ours[key] for key in lengths} == pytest.approx(lengths)
        assert {**ours, **lengths} == {**whole, **lengths}


def test_controls_are_timed_from_their_configs_and_other_libraries_networks_left_out(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row of Torch-Pruning has the dense network's config: it would be timed as if nothing had been pruned."""
    names = ("dense_s0", "narrow30_s0", "trained30_tp_l1_s0")
    runs = [run for run in sweep.declared() if run.name in names]
    for run in runs:
        (tmp_path / f"{run.name}.json").write_text(json.dumps(dict(state="finished", config=run.config)))
    times = torch.tensor([[2e6, 1e6], [4e6, 3e6], [4e6, 2e6]], dtype=torch.float64)
    monkeypatch.setattr("mmitp.pruning.latency.paired_times", lambda models, *_, rounds: times[:, : len(models)])
    place = sweep.Sweep(runs, tmp_path, tmp_path / "work", configs=ROOT / "configs/cifar10")
    sweep.latency(place, runs, rounds=3, dense=sweep.DENSE, shape=(32, 32))
    of = {name: json.loads((tmp_path / f"{name}.json").read_text()).get("latency") for name in names}
    assert of["narrow30_s0"]["ms"] == 2.0
    assert of["narrow30_s0"]["ratio"] == [0.5, 0.5, 0.625]  # of 0.5, 0.75 and 0.5
    assert of["dense_s0"]["ms"] == of["narrow30_s0"]["dense_ms"] == 4.0
    assert of["trained30_tp_l1_s0"] is None
    assert "trained30_tp_l1_s0: left out, no config builds the network" in capsys.readouterr().out
    alone = next(run for run in runs if run.name == "dense_s0")
    sweep.latency(place, [alone], rounds=3, dense=sweep.DENSE, shape=(32, 32))
    assert "dense_s0: 4.0 ms, 1.0 of the dense network's" in capsys.readouterr().out


def test_a_network_with_its_masks_in_place_is_not_timed_as_the_dense_one(
    sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the paper's mode masks stay: nothing small is left in the work folder."""
    run = next(run for run in sweep.declared() if run.name == "psi30_s0")
    log = tmp_path / "work" / run.name / "20260101_000000" / "vis_data"
    log.mkdir(parents=True)
    config = load_config(str(ROOT / f"configs/cifar10/{run.config}.py"))
    config.dump(log / "config.py")
    (log / "scalars.json").touch()
    (tmp_path / f"{run.name}.json").write_text(json.dumps(dict(state="finished", config=run.config)))
    place = sweep.Sweep([run], tmp_path, tmp_path / "work", configs=ROOT / "configs/cifar10")
    with pytest.raises(SystemExit, match="has left its network"):
        sweep.latency(place, [run], rounds=1, dense=sweep.DENSE, shape=(32, 32))
    assert "psi30_s0: left out, its masks were not cut out" in capsys.readouterr().out


def test_a_run_that_options_change_does_not_go_by_its_configs_costs(sweep: Any) -> None:
    runs = {run.name: run for run in sweep.declared()}
    keys = {name: sweep.cost_key(runs[name]) for name in ("psi30_brief_s0", "psi30_fisher_s1", "trained30_fisher_s0")}
    assert keys == {
        "psi30_brief_s0": "resnet20_cifar10_psi30_brief_short",
        "psi30_fisher_s1": "psi30_fisher",
        "trained30_fisher_s0": "trained30_fisher",
    }
    entry = dict(epochs=dict(step=10), step=dict(median=0.5), dense_epochs=10)
    known = {runs[name]: dict(config=runs[name].config) for name in keys}
    costs = {"resnet20_cifar10_psi30_brief_short": entry}
    of = {run.name: sweep.relative_cost(k, sweep.costs_of(run.row, known, costs)) for run, k in known.items()}
    assert of == {"psi30_brief_s0": 0.5, "psi30_fisher_s1": None, "trained30_fisher_s0": None}


def test_costs_are_of_the_schedules_that_the_runs_have(sweep: Any, tmp_path: Path) -> None:
    whole_run = importlib.import_module("whole_run")
    runs = sweep.declared()
    works = sweep.Sweep(runs, tmp_path, tmp_path)
    for name, entry in sweep.read(sweep.METRICS, "costs").items():
        run = next(run for run in runs if sweep.cost_key(run) == name)
        cfg = load_config(str(sweep.config_file(works, run, tmp_path)))
        hook = next((h for h in cfg.get("custom_hooks") or [] if h.type == "mmitp.PruneHook"), None)
        epochs = cfg.train_cfg.max_epochs
        if hook is None:
            expected = dict(step=epochs)
        else:
            begin, end = whole_run.window_epochs(hook, epochs)
            spans = dict(before=begin, slimmed=epochs - end)
            expected = spans if hook.get("slim_at_end") else dict(before=sum(spans.values()))
            expected["window"] = end - begin
        assert entry["epochs"] == pytest.approx(expected), name
        assert entry["dense_epochs"] == sweep.DENSE_EPOCHS


def test_a_step_measured_several_times_costs_the_median(sweep: Any) -> None:
    entry = dict(step=dict(median=0.6), earlier=[dict(step=dict(median=0.5)), dict(step=dict(median=0.8))])
    assert sweep.step_medians(entry, "step") == (0.6, [0.5, 0.8, 0.6])
    assert sweep.whole_run(dict(entry, epochs=dict(step=16), dense_epochs=10)) == pytest.approx(0.96)


def test_a_finished_runs_length_is_that_of_the_measurements_before_it(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([0.8, 0.7, 0.6, 0.5])
    lefts = []

    def cost(*_: Any, left: Path | None) -> dict[str, Any]:
        lefts.append(left)
        return dict(step=dict(median=next(measured)), epochs=dict(step=12), dense_epochs=10)

    monkeypatch.setattr("whole_run.whole_run_cost", cost)
    slim = tmp_path / "a_s0/slim/config.py"
    slim.parent.mkdir(parents=True)
    slim.touch()
    run = sweep.trained("a", "row", 0.5, 0, "c")
    (tmp_path / "c.py").touch()
    driver = sweep.Sweep([run], tmp_path, tmp_path, configs=tmp_path)
    for finished in (False, False, True, True):
        if finished:
            write(tmp_path, "a_s0", accuracy=80.0)
        sweep.cost(driver, [run], 2, sweep.DENSE)
    entry = sweep.read(tmp_path, "costs")["c"]
    assert sweep.step_medians(entry, "step")[1] == [0.8, 0.7, 0.6, 0.5]
    assert entry["length_from"] == 2
    assert lefts == [None, None, slim, slim]
    assert not any("length_from" in before for before in entry["earlier"])


def test_the_cost_of_a_run_with_options_is_that_of_its_own_schedule(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def cost(file: Path, *_: Any, left: Path | None) -> dict[str, Any]:
        seen[file.stem] = load_config(str(file)), left
        return dict(slimmed=dict(median=0.5), epochs=dict(slimmed=4), dense_epochs=10)

    monkeypatch.setattr("whole_run.whole_run_cost", cost)
    runs = [sweep.from_trained("fisher", 30, 0), sweep.brief(30, 0)]
    left = tmp_path / "psi30_brief_s0/slim/config.py"
    left.parent.mkdir(parents=True)
    left.touch()
    write(tmp_path, "psi30_brief_s0", accuracy=80.0, config=runs[1].config)
    write(tmp_path, "trained30_fisher_s0", accuracy=85.0, config=runs[0].config)
    sweep.cost(sweep.Sweep(runs, tmp_path, tmp_path), runs, 2, sweep.DENSE)
    assert seen[runs[1].config][1] == left
    cfg, none = seen["trained30_fisher_s0"]
    assert none is None  # the network of another run of the same config is not this one's
    assert (cfg.train_cfg.max_epochs, cfg.custom_hooks[0].push, cfg.custom_hooks[0].begin) == (4, "fisher", 0.0625)
    costs = sweep.read(tmp_path, "costs")
    assert set(costs) == {"trained30_fisher", runs[1].config}
    costs[runs[1].config]["slimmed"]["median"] = 1.0
    known = {run: sweep.read(tmp_path, run.name) for run in runs}
    own = [sweep.relative_cost(known[run], sweep.costs_of(run.row, known, costs)) for run in runs]
    assert own == [pytest.approx(0.2), pytest.approx(0.4)]


def test_others_have_as_much_time_from_public_weights_as_ours(sweep: Any) -> None:
    costs = sweep.read(sweep.METRICS, "costs")
    ours = sweep.whole_run(costs["trained30_fisher"]) * sweep.DENSE_EPOCHS
    assert sweep.TRAINED_TIME == pytest.approx(ours, rel=0.03)
    run = sweep.torch_pruning_trained("taylor", 30, 1)
    assert run.args[run.args.index("--epochs") + 1] == str(sweep.TRAINED_TIME)
    assert run.start == sweep.from_trained("fisher", 30, 1).start


def test_a_rivals_dense_phase_may_be_somebody_elses(tmp_path: Path) -> None:
    rival = importlib.import_module("torch_pruning_cifar")

    def first(*words: str) -> dict[str, Any]:
        args = ["--dense-weights", "w.pth", "--ratio", "0.3", "--ranking", "l1", "--epochs", "3", *words]
        return rival.first_phase(rival.command_line().parse_args(args))

    none = first("--seed", "1")
    assert (none["seed"], none["epochs"], none["train_seconds"]) == (1, 0, 0.0)
    path = tmp_path / "dense.json"
    path.write_text(json.dumps(dict(config="c", seed=1, epochs=[dict(epoch=6), dict(epoch=7)], train_seconds=9.0)))
    known = first("--dense-metrics", str(path))
    assert (known["config"], known["seed"], known["epochs"], known["train_seconds"]) == ("c", 1, 7, 9.0)
    with pytest.raises(SystemExit, match="has seed 1"):
        first("--dense-metrics", str(path), "--seed", "0")


def test_every_run_has_its_own_name_and_what_it_needs_is_declared(sweep: Any) -> None:
    runs = sweep.declared()
    names = [run.name for run in runs]
    assert len(names) == len(set(names))
    assert {run.needs for run in runs} - {None} <= set(names)
    assert all((ROOT / "benchmarks" / run.script).is_file() for run in runs)


def test_runs_are_chosen_by_beginnings_and_globs(sweep: Any) -> None:
    def names(*patterns: str) -> list[str]:
        return [run.name for run in sweep.selected(sweep.declared(), list(patterns))]

    assert names("narrow30") == ["narrow30_s0", "narrow30_s1", "narrow30_s2", "narrow30_x3_s0"]
    assert names("narrow30_s") == ["narrow30_s0", "narrow30_s1", "narrow30_s2"]
    assert names("*l115_s1", "dense_s2") == ["dense_s2", "tp_l115_s1"]
    with pytest.raises(SystemExit, match="no declared run"):
        names("narrow31")


# -- the driver

#: Writes down that it began; without a file 'go' beside it, it waits to be stopped in its second epoch.
SCRIPT = """
import argparse, json, pathlib, time
parser = argparse.ArgumentParser()
for option in ("--seed", "--work-dir", "--metrics", "--data-root"):
    parser.add_argument(option)
args = parser.parse_args()
work = pathlib.Path(args.work_dir)
path = pathlib.Path(args.metrics)
path.write_text(json.dumps(dict(state="running", epochs=[dict(epoch=1, accuracy=50.0)])))
with open(work / "begun", "a") as file:  # from here on the test may end it: the file above is whole
    file.write("x")
while not (work.parent / "go").exists():
    time.sleep(0.05)
(work / "weights.pth").touch()
path.write_text(json.dumps(dict(state="finished", accuracy=60.0 + int(args.seed), ops_kept=0.5, epochs=[])))
"""
DRIVER = """
import pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import sweep
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
folder = pathlib.Path(sys.argv[2])
run = lambda name, seed, **more: sweep.Run(name, "row", 0.5, seed, str(folder / "script.py"), (), sweep.DENSE, **more)
runs = [run("second", 1, needs="first"), run("first", 0)]
state = sweep.Sweep(runs, folder / "out", folder / "work")
sys.exit(state.work_off(runs[:1], jobs=2, every=0.05))
"""


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "out").mkdir()

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, str(ROOT / "benchmarks"), str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return start


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 30 s"
        time.sleep(0.05)


def test_a_stopped_sweep_goes_on_and_never_repeats_a_finished_run(driver: Any, tmp_path: Path) -> None:
    begun = tmp_path / "work/first/begun"
    first = driver()
    until(begun.exists)
    first.send_signal(signal.SIGTERM)
    assert "first: stopped" in first.communicate(timeout=30)[0]
    assert first.returncode == 143

    (tmp_path / "work/go").touch()
    second = driver()
    told = second.communicate(timeout=30)[0]
    assert second.returncode == 0
    assert begun.read_text() == "xx"
    # the run that the chosen one needs comes first, though it was not chosen and is declared later
    assert told.index("first: 60.00 %") < told.index("second: started") < told.index("second: 61.00 %")

    third = driver()
    assert third.communicate(timeout=30)[0] == ""
    assert third.returncode == 0
    assert begun.read_text() == "xx"


def test_a_finished_run_that_is_repeated_for_its_weights_keeps_its_metrics(driver: Any, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/go").touch()
    known = json.dumps(dict(state="finished", accuracy=70.0, ops_kept=0.5, epochs=[]))
    (tmp_path / "out/first.json").write_text(known)
    run = driver()
    assert "second: 61.00 %" in run.communicate(timeout=30)[0]
    assert (tmp_path / "work/first/weights.pth").exists()
    assert (tmp_path / "out/first.json").read_text() == known


def test_a_run_whose_driver_was_killed_is_not_started_twice(driver: Any, tmp_path: Path) -> None:
    begun = tmp_path / "work/first/begun"
    first = driver()
    until(begun.exists)
    first.kill()
    first.communicate(timeout=30)
    second = driver()
    told = second.communicate(timeout=30)[0]
    assert second.returncode == 2  # it, and the one that needs it
    assert "first: left out, it is being run by another driver, or by one that was killed" in told
    assert "second: left out, first failed" in told
    assert begun.read_text() == "x"
    (tmp_path / "work/go").touch()
    until(lambda: json.loads((tmp_path / "out/first.json").read_text())["state"] == "finished")


def test_a_run_without_its_config_or_package_is_named_and_left_out(sweep: Any, tmp_path: Path, capsys: Any) -> None:
    runs = [
        sweep.Run("a", "row", 0.5, 0, "script.py", (), "resnet20_of_tomorrow"),
        sweep.Run("b", "row", 0.5, 0, "script.py", (), sweep.DENSE, package="package_of_tomorrow"),
    ]
    assert sweep.Sweep(runs, tmp_path, tmp_path).work_off(runs) == 2
    told = capsys.readouterr().out
    assert "a: left out, no config resnet20_of_tomorrow" in told
    assert "b: left out, no package package_of_tomorrow" in told


def test_a_needed_run_is_repeated_where_its_weights_are_not_at_hand(sweep: Any, tmp_path: Path) -> None:
    first = sweep.Run("first", "row", 1.0, 0, "script.py", (), sweep.DENSE)
    second = sweep.Run("second", "row", 0.5, 0, "script.py", (), sweep.DENSE, needs="first")
    (tmp_path / "first.json").write_text(json.dumps(dict(state="finished")))
    state = sweep.Sweep([first, second], tmp_path, tmp_path / "work")
    assert state.wanted([first, second]) == [first, second]
    (tmp_path / "work/first").mkdir(parents=True)
    (tmp_path / "work/first/weights.pth").touch()
    assert state.wanted([first, second]) == [second]


# -- the tables


def write(out: Path, name: str, **metrics: Any) -> None:
    common = dict(state="finished", config="c", ops_kept=0.5, params_kept=0.5, train_seconds=1000.4)
    (out / f"{name}.json").write_text(json.dumps(dict(common, **metrics)))


def test_the_table_gives_mean_spread_and_cost_of_the_finished_runs(sweep: Any, tmp_path: Path) -> None:
    def run(name: str, row: str, seed: int, target: float = 0.5, **more: Any) -> Any:
        return sweep.Run(name, row, target, seed, "measured.py", (), "c", **more)

    runs = [
        run("a1", "ours", 1),
        run("a0", "ours", 0),
        run("b0", "theirs", 0),
        run("b1", "theirs", 1),
        run("d", "dense", 0, 1.0),
        run("h", "hidden", 0, 1.0, shown=False),
        run("l", "ours", 0, times=3),
        run("s", "ours", 0, start="public.pth"),
    ]
    write(tmp_path, "s", accuracy=88.0)
    write(tmp_path, "l", accuracy=83.0)
    write(tmp_path, "a0", accuracy=80.0, ops_kept=0.48, params_kept=0.5)
    write(tmp_path, "a1", accuracy=82.0, ops_kept=0.5, seconds_with_validation=2000, train_seconds=None)
    known = json.loads((tmp_path / "a1.json").read_text())
    del known["train_seconds"]
    (tmp_path / "a1.json").write_text(json.dumps(known))
    write(tmp_path, "b0", accuracy=84.5, config=sweep.DENSE, relative_cost=0.98, ranking="l1")
    write(tmp_path, "b1", state="running", accuracy=None)
    write(tmp_path, "d", accuracy=90.0, config=sweep.DENSE, ops_kept=1.0, params_kept=1.0)
    write(tmp_path, "h", accuracy=85.0)
    for name, ms, ratio in (("a0", 2.0, 0.5), ("a1", 3.0, 0.7)):
        known = json.loads((tmp_path / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(known, latency=dict(ms=ms, ratio=[0.1, ratio, 0.9]))))
    (tmp_path / "costs.json").write_text(
        json.dumps(dict(c=dict(step=dict(median=0.8), epochs=dict(step=64), dense_epochs=50)))
    )
    header = "| | n | accuracy, % | standard deviation | by seed | ops | params | ms (over dense) | "
    header += "cost | processor time, s |"
    rule = "|---|---|---|---|---|---|---|---|---|---|"
    # standard deviation of 80 and 82: sqrt(2)
    assert sweep.tables(runs, tmp_path).splitlines() == [
        "Dense:",
        "",
        header,
        rule,
        f"| dense (`{sweep.DENSE}`) | 1 | **90.00** | - | 0: 90.00 | 1 | 1 | - | 1.00 | 1,000 |",
        "",
        "At most 0.5 of the operations:",
        "",
        header,
        rule,
        "| theirs | 1 | **84.50** | - | 0: 84.50 | 0.5 | 0.5 | - | 0.98 | 1,000 |",
        "| ours (`c`) | 2 | **81.00** | 1.41 | 0: 80.00, 1: 82.00 | 0.48 to 0.5 | 0.5 | 2.5 (0.60) | 1.02 | "
        "1,000 / 2,000 (v) |",
        "",
        "At most 0.5 of the operations, 3 times as long:",
        "",
        header,
        rule,
        "| ours (`c`) | 1 | **83.00** | - | 0: 83.00 | 0.5 | 0.5 | - | 1.02 | 1,000 |",
        "",
        "At most 0.5 of the operations, from public weights, 4 epochs or as much time:",
        "",
        header,
        rule,
        "| ours (`c`) | 1 | **88.00** | - | 0: 88.00 | 0.5 | 0.5 | - | - | 1,000 |",
    ]


def test_a_run_without_the_weights_that_it_starts_from_is_left_out(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sweep.from_trained("fisher", 30, 0)
    assert run.args[run.args.index("--start") + 1] == run.start
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    works = sweep.Sweep([run], tmp_path, tmp_path)
    assert works.missing(run).startswith(f"no {run.start}")
    (tmp_path / run.start).parent.mkdir()
    (tmp_path / run.start).touch()
    assert works.missing(run) == ""


def test_the_readme_holds_the_tables_of_the_committed_metrics(sweep: Any) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/sweep.py"), "table", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, check=False)
    assert done.returncode == 0, done.stderr


def test_tables_elsewhere_than_in_the_metrics_are_noticed(sweep: Any) -> None:
    text = f"before\n{sweep.BEGIN}\nold\n{sweep.END}\nafter\n"
    assert sweep.with_tables(text, "new\n") == f"before\n{sweep.BEGIN}\n\nnew\n\n{sweep.END}\nafter\n"
    with pytest.raises(SystemExit, match="each once"):
        sweep.with_tables("no marks", "new\n")


def test_committed_metrics_are_those_of_declared_runs_and_name_their_origin(sweep: Any) -> None:
    runs = {run.name: run for run in sweep.declared()}
    for path in sorted(sweep.METRICS.glob("*.json")):
        if path.stem == "costs":
            continue
        run, known = runs[path.stem], json.loads(path.read_text(encoding="utf-8"))
        assert known["seed"] == run.seed
        assert known["config"] == run.config
        assert known["commit"] and known["machine"] and known["versions"]["torch"]
        assert known["command"].startswith("python ")
        assert known["ops_kept"] <= run.target or not run.shown
        assert path.stat().st_size < 8000
