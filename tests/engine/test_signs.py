"""The published signs, on logs made by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mmitp.commands.check_signs import main
from mmitp.engine.hooks import PruneHook
from mmitp.engine.signs import check_signs, read_run

TOOL = Path(__file__).parents[2] / "tools" / "check_signs.py"
CONFIG = """
model = dict(type="mmitp.MaskedModel", of="Toy", prune=dict(init={init}))
custom_hooks = [dict(type="mmitp.PruneHook", target={target}, b={b}, begin=2, end=8, lr=0.01)]
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, weight_decay=1e-4), paramwise_cfg={paramwise})
train_cfg = dict(by_epoch=True, max_epochs=10)
"""


def write(folder, losses, lr, ratio_before=None, target=0.2, b=10, init=1.0, paramwise=None, part="a", epoch=1):
    """Two lines an epoch of 100 iterations, after 50 and 100 of them."""
    log = folder / part / "vis_data"
    log.mkdir(parents=True)
    (log / "config.py").write_text(CONFIG.format(target=target, b=b, init=init, paramwise=paramwise or {}))
    with (log / "scalars.json").open("w") as file:
        for i, (loss, rate) in enumerate(zip(losses, lr, strict=True), start=2 * (epoch - 1)):
            line = dict(L_HW=loss, lr=rate, epoch=i // 2 + 1, step=50 * (i + 1))
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"accuracy/top1": 50.0, "step": 1}) + "\n")
    if ratio_before is not None:
        report = dict(
            ratio=min(ratio_before, target),
            ratio_before=ratio_before,
            switched_off=3,
            macs_dense=1000,
            macs_kept=round(1000 * min(ratio_before, target)),
            params_dense=1000,
            params_kept=370,
        )
        (folder / "pruning.json").write_text(json.dumps(report))
    return folder


def shows(folder):
    flat, gradual, drops, zero, parameters, stall, miss = check_signs(read_run(folder))
    return [sign.shows for sign in (flat, gradual, drops, zero, parameters, stall, miss)]


PUBLISHED_LOSS = [0.8] * 4 + [0.79, 0.77, 0.74, 0.72, 0.50, 0.40, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0] + [0.0] * 4
PUBLISHED_LR = [0.1] * 8 + [0.01] * 12


def test_a_run_like_the_published_one_shows_every_sign(tmp_path):
    folder = write(tmp_path, PUBLISHED_LOSS, PUBLISHED_LR, ratio_before=0.17, b=50)
    assert shows(folder) == [True, True, True, True, True, None, None]
    figures = [sign.figures for sign in check_signs(read_run(folder))]
    assert "logged 0.8000 to 0.8000" in figures[0]
    assert "95 % at 3.50, half at 5.50, 0 at 7.00" in figures[1]
    assert "largest fall between two lines 0.2200" in figures[1]
    assert "parameters 0.3700, operations 0.1700" in figures[4]


@pytest.mark.parametrize(
    ("hook", "window", "last"),
    [
        (dict(begin=0.2, end=0.8), (2, 8), 10.0),
        (dict(begin=0.25, end=0.75, by_epoch=False), (250, 750), 1000.0),
        (dict(begin=150, end=620, by_epoch=False), (150, 620), 1000.0),
    ],
)
def test_the_window_is_the_hooks(tmp_path, hook, window, last):
    """Ten epochs of 100 iterations, in the unit of the window."""
    folder = write(tmp_path, PUBLISHED_LOSS, PUBLISHED_LR, ratio_before=0.17)
    file = folder / "a/vis_data/config.py"
    file.write_text(file.read_text() + f"custom_hooks[0].update({hook})\n")
    run = read_run(folder)
    assert (run.begin, run.end) == window
    assert run.times[-1] == last


def test_the_drop_is_measured_on_both_sides(tmp_path):
    # The rate drops after the line at epoch 4; a tenth of the run is one epoch, two lines.
    folder = write(tmp_path, PUBLISHED_LOSS, PUBLISHED_LR, ratio_before=0.17)
    figures = check_signs(read_run(folder))[2].figures
    assert figures == "at 4.0: fell by 0.0500 in the 1.0 before, 0.3200 after"


def test_what_does_not_behave_so_is_told(tmp_path):
    losses = [0.8, 0.6, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2] + [0.15] * 7 + [0.0] * 4
    folder = write(tmp_path, losses, PUBLISHED_LR, ratio_before=0.35)
    # Not flat, no fall after the drop, not at 0 by itself: 0.15 above 0.2, so that b = 10 misses it.
    assert shows(folder) == [False, True, False, False, True, None, True]
    assert "operations 0.3500 when the window ended" in check_signs(read_run(folder))[6].figures


def test_a_fall_at_one_stroke_is_not_gradual(tmp_path):
    folder = write(tmp_path, [0.8] * 6 + [0.1, 0.0] + [0.0] * 12, [0.1] * 20, ratio_before=0.2)
    assert shows(folder)[1] is False


@pytest.mark.parametrize(
    ("init", "b", "ratio_before", "expected"),
    [(1.0, 10, 0.9, True), (1.0, 10, 0.22, False), (0.3, 10, 0.9, None), (1.0, "'auto'", 0.9, None)],
)
def test_without_decay_the_stall_is_looked_for_only_from_one_and_at_a_fixed_b(
    tmp_path, init, b, ratio_before, expected
):
    no_decay = dict(custom_keys=dict(prune_mask=dict(decay_mult=0.0)))
    folder = write(tmp_path, [0.8] * 20, [0.1] * 20, ratio_before, init=init, b=b, paramwise=no_decay)
    assert shows(folder)[5] is expected


def test_a_run_under_way_leaves_the_end_open(tmp_path):
    folder = write(tmp_path, PUBLISHED_LOSS[:8], PUBLISHED_LR[:8])
    assert shows(folder) == [True, True, None, None, None, None, None]


def test_a_resumed_run_is_read_as_one(tmp_path):
    write(tmp_path, PUBLISHED_LOSS[:8], PUBLISHED_LR[:8], part="a")
    write(tmp_path, PUBLISHED_LOSS[6:], PUBLISHED_LR[6:], ratio_before=0.17, part="b", epoch=4)
    run = read_run(tmp_path)
    assert run.hw_loss == PUBLISHED_LOSS
    assert run.times == [0.5 * (i + 1) for i in range(20)]


def test_folders_without_a_pruning_run_are_errors(tmp_path):
    with pytest.raises(ValueError, match="scalars.json"):
        read_run(tmp_path)
    write(tmp_path, [], [])
    with pytest.raises(ValueError, match="no run with PruneHook"):
        read_run(tmp_path)


def test_the_hook_is_known_by_its_class_and_a_config_cut_off_is_named(tmp_path):
    config = write(tmp_path, PUBLISHED_LOSS, PUBLISHED_LR) / "a" / "vis_data" / "config.py"
    by_name = config.read_text()
    config.write_text("from mmitp.engine.hooks import PruneHook" + by_name.replace('"mmitp.PruneHook"', "PruneHook"))
    assert read_run(tmp_path).target == 0.2
    config.write_text(by_name[:60])
    with pytest.raises(ValueError, match=r"a/vis_data/config\.py cannot be read as a config: SyntaxError"):
        read_run(tmp_path)


def test_the_tool_prints_signs_and_draws_all_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("check_signs", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    one = write(tmp_path / "one", PUBLISHED_LOSS, PUBLISHED_LR, 0.17, b=50)
    two = write(tmp_path / "two", PUBLISHED_LOSS[:8], PUBLISHED_LR[:8])
    monkeypatch.setattr(sys, "argv", ["check_signs.py", str(one), str(two), "--plot", str(tmp_path / "l.svg")])
    tool.main()
    out = capsys.readouterr().out
    assert "one: psi* 0.2, b 50, window 2 to 8, M from 1" in out
    assert "yes  L_HW ends at 0: 0.0000 when the window ended" in out
    assert "  -  b = 10 misses 0.2: not frozen yet" in out
    picture = (tmp_path / "l.svg").read_text()
    assert "<!-- one -->" in picture and "<!-- two -->" in picture


def test_settings_that_a_config_leaves_out_are_the_hooks_own(tmp_path):
    folder = write(tmp_path, PUBLISHED_LOSS, PUBLISHED_LR, ratio_before=0.17)
    config = folder / "a" / "vis_data" / "config.py"
    lines = [
        'model = dict(type="mmitp.MaskedModel", of="Toy", prune=None)',
        'custom_hooks = [dict(type="mmitp.PruneHook", target=0.2, begin=2, end=8)]',
        'optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, weight_decay=None), paramwise_cfg=None)',
        "train_cfg = dict(by_epoch=True, max_epochs=10)",
        "limit = inf",  # as mmengine writes it
    ]
    config.write_text("\n".join(lines))
    run = read_run(folder)
    assert (run.b, run.init, run.decay) == (PruneHook(target=0.2).arguments["b"], 1.0, 0.0)
    assert shows(folder)[-2:] == [None, None]  # they speak of a fixed b
    config.write_text(config.read_text().replace("paramwise_cfg=None", "paramwise_cfg=dict(custom_keys=None)"))
    assert read_run(folder).decay == 0


def test_runs_of_one_name_are_told_apart_and_the_axis_names_its_unit(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folders = [write(tmp_path / part / "_run $1$ ü", PUBLISHED_LOSS, PUBLISHED_LR, 0.17) for part in "ab"]
    picture = tmp_path / "l.svg"
    assert main([*map(str, folders), "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    names = ["a/_run $1$ ü", "b/_run $1$ ü"]
    assert [row.partition(":")[0] for row in out.splitlines() if ": psi* 0.2" in row] == names
    text = picture.read_text()
    assert all(f"<!-- {name} -->" in text for name in names)
    assert "<!-- epoch -->" in text
    config = folders[0] / "a" / "vis_data" / "config.py"
    config.write_text(config.read_text().replace("begin=2, end=8", "begin=200, end=800, by_epoch=False"))
    assert main([str(folders[0]), "--out", str(picture)]) == 0
    assert "<!-- iteration -->" in picture.read_text()
    assert "<!--  _run" in picture.read_text()  # matplotlib leaves names that begin with _ out
    with pytest.raises(SystemExit):
        main([*map(str, folders), "--out", str(picture)])
    assert "these windows count differently" in capsys.readouterr().err


def test_damaged_files_are_named_and_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    folder = write(tmp_path, PUBLISHED_LOSS, PUBLISHED_LR, ratio_before=0.17, b=50)
    log = folder / "a" / "vis_data" / "scalars.json"
    whole = log.read_text()
    log.write_text(whole + '\n\n{"L_HW": 0.1, "st')
    assert read_run(folder).hw_loss == PUBLISHED_LOSS
    log.write_text(whole[:10] + "\n" + whole)
    with pytest.raises(ValueError, match=r"scalars\.json, record 1 is damaged"):
        read_run(folder)
    log.write_bytes(b"\xff\xfe\n" + whole.encode())
    with pytest.raises(ValueError, match=r"scalars\.json, record 1 is damaged"):
        read_run(folder)
    log.write_text(whole)
    for text, says in (('{"target": 0.5, ', "is damaged"), ("[]", "holds a list")):
        (folder / "pruning.json").write_text(text)
        with pytest.raises(ValueError, match=rf"pruning\.json {says}"):
            read_run(folder)
    (log.parent / "config.py").unlink()
    with pytest.raises(ValueError, match=r"no .*config\.py"):
        read_run(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(ratio="0.5"), "pruning.json: 'ratio' must be a finite number, got '0.5'"),
        (dict(switched_off=None), "pruning.json: 'switched_off' must be a finite number, got None"),
        (dict(params_dense=0), "pruning.json: 'params_dense' must be a finite number above 0, got 0"),
    ],
)
def test_figures_of_the_freeze_that_are_no_figures_are_named(tmp_path, change, says):
    write(tmp_path, PUBLISHED_LOSS, PUBLISHED_LR, ratio_before=0.17, b=50)
    report = tmp_path / "pruning.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | change))
    with pytest.raises(ValueError, match=says):
        read_run(tmp_path)
