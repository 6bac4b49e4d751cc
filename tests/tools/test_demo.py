"""tools/demo.py: what fits into the time on a fast, a slow and a busy machine, and the table it ends with."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from mmitp.engine.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0.1, (16, 448, 112)),  # 3600 steps fit: as many epochs as are taken at most
        (1.0, (6, 448, 109)),  # 360 steps: 6 epochs of 56; 96 s of tests at 7/8 s an image
        (10.0, (4, 72, 10)),  # 36 steps: 4 epochs of 9 batches
        (100.0, (4, 16, 8)),  # what is done at least
    ],
)
def test_the_run_is_as_long_as_fits(demo: ModuleType, step: float, expected: tuple[int, int, int]) -> None:
    assert demo.plan(600.0, step) == expected


def test_a_run_too_short_to_learn_says_so_and_what_would_be_enough(demo: ModuleType) -> None:
    assert demo.too_short(demo.Plan(4, 192, 40), 2.0) == ""
    said = demo.too_short(demo.Plan(4, 80, 12), 8.55)
    assert "saw 320 images each, at 8.6 s a step of 8" in said
    assert "--minutes 22" in said  # 4 epochs of 19 steps of 8.55 s are 10.8 minutes, of which training is 0.6; and 3
    assert demo.plan(19 * 60, 8.55).images * 4 >= 600


def test_the_plan_fits_both_configs(demo: ModuleType) -> None:
    it = demo.Plan(4, 16, 8)
    for name, config in demo.CONFIGS.items():
        cfg = load_config(str(config), demo.schedule(name, it) + demo.data_options(Path("scenes")))
        assert cfg.train_cfg.max_epochs == 4
        assert cfg.train_dataloader.dataset.indices == 16
        assert cfg.train_dataloader.batch_size == demo.BATCH
        assert [scheduler.end for scheduler in cfg.param_scheduler] == [2, 4]
        assert cfg.test_dataloader.dataset.data_root == cfg.test_evaluator.data_root == "scenes/"
        if name == "pruned":
            hook = cfg.custom_hooks[0]
            assert (hook.begin, hook.end, hook.slim_at_end, tuple(hook.input_shape)) == (1, 2, True, demo.SHAPE)
    dense, pruned = (load_config(str(config)) for config in demo.CONFIGS.values())
    assert pruned.model == dict(dense.model, type="mmitp.MaskedModel", of="mmdet.CenterNet")
    assert not dense.get("custom_hooks")


def test_the_state_of_a_training_is_its_logs_last_whole_line(demo: ModuleType, tmp_path: Path) -> None:
    assert demo.state(tmp_path) == "starting"
    log = tmp_path / "20260101" / "vis_data"
    log.mkdir(parents=True)
    line = dict(epoch=3, loss=2.345, ops_kept=0.714)
    (log / "scalars.json").write_text(json.dumps(line) + '\n{"epoch": 4, "lo')
    assert demo.state(tmp_path) == "epoch 3, loss 2.35, 0.71 of the operations (target 0.5)"


def test_a_tool_that_fails_ends_the_demo_with_its_last_words(demo: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('the disk is full')")
    job = demo.start([str(script)], tmp_path / "log")
    with pytest.raises(RuntimeError, match="training failed, .*log has all of it:\nthe disk is full"):
        demo.finish({"training": (job, tmp_path / "log")}, demo.Progress(1), lambda: "")


def test_the_table_sets_dense_beside_pruned(demo: ModuleType) -> None:
    dense = dict(car=[50.0, 40.126, 30.0], car_attacked=[5, 4, 3], macs=1000, params=2000, ms=8.26, train_minutes=3.14)
    pruned = dict(dense, macs=499, params=900, ms=5.0)
    rows = demo.table(dict(attack="the same under PGD-5", dense=dense, pruned=pruned))
    assert rows[0] == ["Car, AP R40, easy / moderate / hard", *["50.00 / 40.13 / 30.00"] * 2]
    assert rows[1][0] == "the same under PGD-5"
    assert rows[2] == ["MACs", "1,000 (1.0000)", "499 (0.4990)"]
    assert rows[3] == ["parameters", "2,000 (1.0000)", "900 (0.4500)"]
    assert rows[4] == ["ms an image, one thread", "8.3", "5.0"]
    assert demo.aligned([["", "dense"], ["MACs", "1"]]) == "      dense\nMACs  1"
