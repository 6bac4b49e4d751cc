"""What strangers and typing errors can make of files and settings: refused in one line that names it, or right.

A few seconds here; ``make fuzz`` runs the same tests with MMITP_FUZZ times as many examples, new ones every time. Tests
whose property is a function inside them are marked for it by hand.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from toy_config import same, tiny_config

import mmitp.engine.config as config_module
from mmitp.datasets import KittiDataset  # noqa: F401  registers what the configs name
from mmitp.engine.checkpoint import read_checkpoint
from mmitp.engine.cli import _explains_itself
from mmitp.engine.config import load_config
from mmitp.engine.hooks import AdversarialHook, CollapseGuardHook, DistillHook, PruneHook
from mmitp.engine.resume import read_training_state
from mmitp.engine.run import build_runner
from mmitp.engine.safe_load import load_data
from mmitp.engine.signs import check_signs, read_run
from mmitp.evaluation import kitti_ap
from mmitp.pruning import MacBudget, mask_model
from mmitp.pruning.latency.cost import LatencyCost
from mmitp.report import read_run as read_report
from mmitp.report import write_report

TIMES = int(os.environ.get("MMITP_FUZZ", "1"))
REFUSED = object()
CONFIG = str(Path(__file__).parents[1] / "configs" / "cifar10" / "resnet20_cifar10_psi50_short.py")


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([10**12, -(10**12), 10**400, 0.0, -1.0, 1e-320, 1e308, float("nan"), float("inf")])
    | st.floats()
    | st.text(max_size=6)
)
#: What JSON, a pickle of data or a config's text can hold.
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def answer(call: Callable[[], Any], *names: str) -> Any:
    """What comes of it, or REFUSED; any error but the user's, in one line and with all names, is a failure."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) or not _explains_itself(error, Path("/nowhere")):
            raise
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        assert text.strip()
        assert "\n" not in text.strip(), text
        assert all(name in text for name in names), (text, names)
        return REFUSED


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def nodes(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a nested value, its own first."""
    yield way
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, (*way, key))


def with_node(value: Any, way: tuple[Any, ...], junk: Any) -> Any:
    """A copy with something else at a place."""
    if not way:
        return junk
    value = copy.deepcopy(value)
    node = value
    for key in way[:-1]:
        node = node[key]
    node[way[-1]] = junk
    return value


# --- KITTI's files

NUMBERS = st.floats(-1e6, 1e6).map(lambda x: f"{x:.2f}") | st.sampled_from(["0", "-1", "3", "1e3", ".5", "+2"])
LABEL = st.tuples(
    st.sampled_from(["Car", "Van", "Pedestrian", "DontCare", "Nonsense"]),
    NUMBERS,
    st.integers(-1, 3).map(str),
    *[NUMBERS] * 12,
)
BAD_TOKENS = ["nan", "inf", "-inf", "1e400", "x", "1_0", "0x1p3", "١", "1,5", "--1"]


def spoilt(text: bytes, at: int, what: bytes, length: int) -> bytes:
    at = at % (len(text) + 1)
    return text[:at] + what + text[at + length :]


@fuzz(50)
@given(
    rows=st.lists(LABEL, max_size=3),
    at=st.integers(0, 400),
    what=st.binary(max_size=6) | st.sampled_from([b"\r", b"\0", b" ", b"\t\t", b"\n\n", b"\xff\xfe"]),
    length=st.integers(0, 9),
)
def test_label_and_result_files_of_any_bytes(folder, rows, at, what, length):
    text = spoilt("".join(" ".join(row) + "\n" for row in rows).encode(), at, what, length)
    path = folder / "000000.txt"
    path.write_bytes(text)
    lines = [line.split() for line in text.removeprefix(b"\xef\xbb\xbf").splitlines() if line.split()]
    for read, columns in ((kitti_ap.read_ground_truth, 15), (kitti_ap.read_detections, 16)):
        found = answer(lambda read=read: read(path), str(path))
        if found is REFUSED:
            continue
        assert len(found.names) == len(lines) == len(found.boxes)
        assert all(len(line) == columns for line in lines)
        assert np.isfinite(found.boxes).all()
        assert [name.encode() for name in found.names] == [line[0] for line in lines] or b"\xef\xbf\xbd" in "".join(
            found.names
        ).encode()
        np.testing.assert_array_equal(found.boxes, [[float(t) for t in line[4:8]] for line in lines] or found.boxes)


@fuzz(30)
@given(
    rows=st.lists(LABEL, min_size=1, max_size=4),
    row=st.integers(0, 3),
    column=st.sampled_from([1, 4, 5, 6, 7]),
    bad=st.sampled_from(BAD_TOKENS),
)
def test_a_bad_number_is_named_by_its_line(folder, rows, row, column, bad):
    row %= len(rows)
    tokens = list(rows[row])
    tokens[column] = bad
    path = folder / "000000.txt"
    path.write_text("".join(" ".join(tokens if i == row else r) + "\n" for i, r in enumerate(rows)), encoding="utf-8")
    assert answer(lambda: kitti_ap.read_ground_truth(path), f"{path}, line {row + 1}: ") is REFUSED


BOX = st.tuples(*[st.floats(-1e5, 1e5, allow_nan=False).map(lambda x: round(x, 4))] * 4)


@fuzz(40)
@given(
    names=st.lists(st.text(min_size=1, max_size=8) | st.sampled_from(["Car", "Person_sitting"]), max_size=4),
    data=st.data(),
)
def test_detections_round_trip(folder, names, data):
    boxes = data.draw(st.lists(BOX, min_size=len(names), max_size=len(names)))
    scores = data.draw(
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=len(names), max_size=len(names))
    )
    wanted = kitti_ap.Detections(names, np.array(boxes, dtype=float).reshape(-1, 4), np.array(scores, dtype=float))
    path = folder / "000000.txt"
    if answer(lambda: kitti_ap.write_detections(path, wanted), str(path)) is REFUSED:
        assert any(name.split() != [name] or not name.isprintable() for name in names)
        return
    found = kitti_ap.read_detections(path)
    assert list(found.names) == names
    np.testing.assert_array_equal(found.boxes, wanted.boxes)
    np.testing.assert_array_equal(found.scores, wanted.scores)
    truth = kitti_ap.GroundTruth(names, wanted.boxes, np.zeros(len(names)), np.zeros(len(names), dtype=np.int64))
    for ap in kitti_ap.evaluate([truth], [found]).values():
        assert ap is None or all(0 <= value <= 100 or np.isnan(value) for value in (*ap.r11, *ap.r40))


FRAMES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\"), min_size=1, max_size=7)


@fuzz(50)
@given(
    frames=st.lists(FRAMES, min_size=1, max_size=5, unique=True),
    end=st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \n\t"]),
    mark=st.booleans(),
    bad=st.none() | st.sampled_from(["../x", "/etc/passwd", "a b", "x\\y", "\x07", "a\u2028b"]),
)
def test_split_files_round_trip_and_name_the_bad_line(folder, frames, end, mark, bad):
    path = folder / "train.txt"
    listed = [*frames, *([bad] if bad else [])]
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(listed).encode())
    found = answer(lambda: kitti_ap.read_split(path), str(path), "line" if bad else "")
    assert found == (REFUSED if bad else frames)
    path.write_text(end.join([*frames, frames[0]]), encoding="utf-8", newline="")
    assert answer(lambda: kitti_ap.read_split(path), repr(frames[0])) is REFUSED


@fuzz(50)
@given(content=st.binary(max_size=40))
def test_split_files_of_any_bytes_stay_in_their_folder(folder, content):
    path = folder / "train.txt"
    path.write_bytes(content)
    found = answer(lambda: kitti_ap.read_split(path), str(path))
    for frame in () if found is REFUSED else found:
        assert (folder / f"{frame}.png").resolve().parent == folder.resolve()


# --- settings


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(config_module, "print_log", lambda *_, **__: None)
    monkeypatch.setattr("mmitp.engine.hooks.adversarial_hook.print_log", lambda *_, **__: None)


@pytest.mark.hypothesis
def test_options_of_any_text():
    values = st.text(max_size=8) | st.sampled_from(["(1,2", "[[[", "nan", "{}", "dict(a=1)", "1e999", "None", "'"])
    keys = st.text(max_size=8) | st.sampled_from(
        ["custom_hooks.0.target", "custom_hooks.1", "train_dataloader.batch_size", "model", "work_dir", "a.b.c", "0.x"]
    )

    @fuzz(15)
    @given(option=st.text(max_size=12) | st.tuples(keys, values).map("=".join))
    @example("custom_hooks=[dict(type=mmitp.PruneHook,target=0.5)]")
    @example("\n=")
    @example("model=(\n")
    @example("model.type=\n")
    @example("model=\n")
    def check(option):
        cfg = answer(lambda: load_config(CONFIG, [option]))
        if cfg is not REFUSED:
            node = cfg
            for part in option.partition("=")[0].split("."):
                node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]

    check()


@fuzz(10)
@given(
    setting=st.sampled_from(
        ["custom_hooks.0.target", "custom_hooks.0.divisor", "train_cfg.max_epochs", "optim_wrapper.optimizer.lr"]
    ),
    value=st.integers(1, 10**9) | st.floats(1e-6, 1e6) | st.booleans() | st.text("abcz_", min_size=1, max_size=5),
)
def test_options_set_what_they_say(setting, value):
    cfg = answer(lambda: load_config(CONFIG, [f"{setting}={value}"]), setting)
    count = setting == "train_cfg.max_epochs" and (isinstance(value, bool) or not isinstance(value, int))
    assert (cfg is REFUSED) == count
    if cfg is not REFUSED:
        node = cfg
        for part in setting.split("."):
            node = node[int(part)] if part.isdecimal() else node[part]
        assert node == value
        assert type(node) is type(value)


HOOKS: dict[type, dict[str, Any]] = {
    PruneHook: dict(target=0.5, slim_at_end=True),
    AdversarialHook: {},
    CollapseGuardHook: {},
    DistillHook: {},
}
ARGUMENTS = [
    (hook, name)
    for hook in HOOKS
    for name in hook.__init__.__code__.co_varnames[1 : hook.__init__.__code__.co_argcount]
]
HINTS = st.sampled_from(
    ["auto", "macs", "params", "pgd", "linf", "l2", "eval", "epoch", "plain", "val", "stop", (32, 32), [1, 2]]
)


@fuzz(250)
@given(argument=st.sampled_from(ARGUMENTS), value=JUNK | HINTS)
@example((PruneHook, "begin"), "1")
@example((PruneHook, "input_shape"), (32.7, 32))
@example((PruneHook, "input_shape"), "32")
@example((PruneHook, "cost"), None)
@example((PruneHook, "cost"), ["macs"])
@example((AdversarialHook, "batchnorm"), "x")
@example((AdversarialHook, "losses"), [])
@example((AdversarialHook, "seed"), 1.5)
@example((AdversarialHook, "warmup"), float("inf"))
@example((AdversarialHook, "by_epoch"), "no")
@example((CollapseGuardHook, "switch_to"), 3)
@example((PruneHook, "slim_every"), "2")
@example((PruneHook, "slim_every"), float("nan"))
@example((DistillHook, "weight"), "1")
@example((DistillHook, "begin"), None)
@example((PruneHook, "divisor"), "auto")
def test_arguments_of_hooks(argument, value):
    hook, name = argument
    # The rule of a target, a size or a window can be broken by its partner's default.
    partner = "begin" if name in ("end", "warmup") else "eps" if name == "alpha" else name
    built = answer(lambda: hook(**{**HOOKS[hook], name: value}))
    if built is REFUSED:
        with pytest.raises((ValueError, OSError), match=f"{name}|{partner}"):
            hook(**{**HOOKS[hook], name: value})
        return
    if isinstance(value, float):
        assert np.isfinite(value)
    if name in ("fill", "slim_at_end", "by_epoch"):
        assert isinstance(value, bool)
    elif isinstance(value, bool):
        pytest.fail(f"{hook.__name__}({name}={value!r}) is taken")
    if isinstance(value, str):
        names = ("b", "interval", "cost", "push", "attack", "norm", "batchnorm", "dropout", "source", "action")
        assert name in (*names, "divisor", "teacher", "scores")
        assert name == "scores" or re.fullmatch(r"[a-z2_]+", value)


# --- latency tables


def _net() -> torch.nn.Module:
    return mask_model(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1)))


def _entry(n_in: int, n_out: int) -> dict[str, Any]:
    return dict(
        inputs=[1, n_in], outputs=[1, n_out], ns=[[1.0, 2.0], [3.0, 4.0]], gather=0.5, scatter=0.0, element=1,
        n_in=n_in, n_out=n_out, pair_macs=9,
    )  # fmt: skip


TABLE = dict(
    format=1, constant=10.0, machine="here", device="cpu", batch=1, shape=[3, 3],
    layers={"0": _entry(4, 8), "2": _entry(8, 2)},
)  # fmt: skip
TABLE_NODES = list(nodes(TABLE))


@fuzz(70)
@given(way=st.sampled_from(TABLE_NODES), junk=JUNK)
@example(("layers", "0", "ns", 0, 0), 1e308)
@example(("constant",), 10**400)
@example(("layers", "0", "element"), 2.4e18)  # no time for an integer of 64 bits
def test_latency_tables_with_a_strange_entry(folder, way, junk):
    assume(json.dumps(junk) is not None)
    table = with_node(TABLE, way, junk)
    path = folder / "table.json"
    path.write_text(json.dumps(table))
    cost = answer(lambda: LatencyCost(str(path)), str(path))
    if cost is REFUSED:
        return
    model = _net()
    budget = answer(lambda: MacBudget(model, torch.zeros(1, 4, 3, 3), cost=cost), str(path))
    if budget is not REFUSED:
        ratio = float(budget.ratio())
        assert 0 <= ratio <= 1 + 1e-9, (way, junk)


@fuzz(60)
@given(at=st.integers(0, 2000), what=st.binary(max_size=5), length=st.integers(0, 30))
def test_latency_tables_of_any_bytes(folder, at, what, length):
    path = folder / "table.json"
    path.write_bytes(spoilt(json.dumps(TABLE).encode(), at, what, length))
    answer(lambda: LatencyCost(str(path)), str(path))


def test_brackets_without_end_are_no_table(folder):
    path = folder / "table.json"
    path.write_text("[" * 100_000)
    assert answer(lambda: LatencyCost(str(path)), "table.json is no latency table") is REFUSED


# --- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained")
    build_runner(tiny_config(folder, epochs=3, hooks=[dict(type="mmitp.AdversarialHook", eps=8, alpha=10)])).train()
    path = folder / "epoch_2.pth"
    return path, torch.load(path, weights_only=False)


@pytest.mark.hypothesis
def test_checkpoints_with_damaged_bytes(folder, trained):
    source, whole = trained
    raw = source.read_bytes()
    path = folder / "epoch_2.pth"
    cfg = tiny_config(folder / "nowhere")

    @fuzz(40)
    @given(at=st.integers(0, len(raw)), what=st.binary(max_size=40), length=st.integers(0, 4000))
    @example(0, b"", len(raw))
    @example(len(raw) - 1, b"", 1)
    def check(at, what, length):
        path.write_bytes(spoilt(raw, at, what, length))
        found = answer(lambda: read_training_state(str(path), cfg), str(path))
        if found is not REFUSED:
            assert all(same(found[key], whole[key]) for key in ("state_dict", "optimizer", "mmitp_prune_hook"))

    check()


@pytest.mark.hypothesis
def test_checkpoints_of_any_bytes(folder):
    path = folder / "x.pth"

    @fuzz(60)
    @given(content=st.binary(max_size=60), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05"]))
    def check(content, head):
        path.write_bytes(head + content)
        assert answer(lambda: read_checkpoint(str(path)), str(path)) is REFUSED
        answer(lambda: load_data(path), str(path))

    check()


def _plain(value: Any) -> Any:
    """What :func:`nodes` goes into: dictionaries and lists."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list) else value


@pytest.mark.hypothesis
def test_checkpoints_with_a_strange_entry_resume_or_are_refused(folder, trained):
    """Whatever is replaced: the run begins again with it, or ends in one line before it has begun."""
    _, whole = trained
    places = [way for way in nodes(_plain(whole)) if way[:1] not in [("state_dict",), ()] or len(way) == 2]
    path = folder / "epoch_2.pth"
    # optimizer and schedulers are torch's and mmengine's to read; they come after the network
    ours = [way for way in places if way[:1] not in [("optimizer",), ("param_schedulers",)]]

    # A run an example: what fails is not made smaller, which takes many.
    @settings(fuzz(6), phases=[Phase.explicit, Phase.generate])
    @given(way=st.sampled_from(ours), junk=JUNK)
    @example(("message_hub", "resumed_keys", "loop_stage"), None)
    @example(("mmitp_prune_hook", "pruner", "count"), "x")
    def check(way, junk):
        torch.save(with_node(whole, way, junk), path)
        cfg = tiny_config(
            folder / "work", epochs=2, resume=True, load_from=str(path),
            hooks=[dict(type="mmitp.AdversarialHook", eps=8, alpha=10)],
        )  # fmt: skip
        answer(lambda: build_runner(cfg).train())

    check()


# --- logs


def _work_folder(folder: Path) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    logs = folder / "run" / "20260101_000000" / "vis_data"
    logs.mkdir(parents=True, exist_ok=True)
    tiny_config(folder / "run", epochs=4).dump(str(logs / "config.py"))
    rows = [dict(step=s, epoch=1 + (s - 1) // 5, iter=s, lr=0.05, L_HW=0.5 - 0.02 * s, loss=1.0) for s in range(1, 21)]
    report = dict(ratio=0.49, ratio_before=0.5, switched_off=3, switched_on=0, target=0.5, params_kept=5, macs_kept=7)
    return logs / "scalars.json", rows, report | dict(params_dense=10, macs_dense=14)


@fuzz(25)
@given(data=st.data(), cut=st.integers(0, 60))
def test_logs_with_a_strange_entry_or_a_torn_end(folder, data, cut):
    log, rows, report = _work_folder(folder)
    where = data.draw(st.sampled_from(["log", "report", "end"]))
    junk = data.draw(JUNK)
    if where == "log":
        rows[4] = with_node(rows[4], data.draw(st.sampled_from(list(nodes(rows[4])))), junk)
    elif where == "report":
        report = with_node(report, data.draw(st.sampled_from(list(nodes(report)))), junk)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    log.write_text(text[: len(text) - cut] if where == "end" else text)
    (folder / "run" / "pruning.json").write_text(json.dumps(report))
    run = answer(lambda: read_run(folder / "run"), str(folder / "run"))
    if where == "end":
        assert run is not REFUSED
    if run is not REFUSED:
        assert len(check_signs(run)) == 7


@fuzz(25)
@given(data=st.data(), cut=st.integers(0, 60))
@example(("report", ("layers", 0, "macs_kept"), "7"), 0)
@example(("report", ("layers",), None), 0)
@example(("report", ("layers", 1), None), 0)
@example(("log", (4, "ops_kept"), "7"), 0)
@example(("log", (4, "step"), 10**400), 0)
@example(("record", ("versions",), [1]), 0)
@example(("test", ("eps", 0), "2"), 0)
@example(("test", ("attacked", 0), 3), 0)
def test_reports_of_files_with_a_strange_entry(folder, data, cut):
    """A report is written whatever stands in the files: what is damaged is left out, and named where it is a file."""
    log, rows, report = _work_folder(folder)
    layer = dict(name="a", macs_dense=4, macs_kept=2, in_channels=2, in_kept=1, out_channels=2, out_kept=2)
    record = dict(command=["mmitp"], config="a.py", device="cpu", versions={"torch": "2"}, processor_seconds=1.5)
    test = dict(clean={"ap": 1.0}, attacked=[{"ap": 0.5}], eps=[2.0], attack=dict(name="pgd", steps=10, norm="linf"))
    files = dict(
        log=[row | dict(time=0.1, ops_kept=0.5) for row in rows],
        report=report | dict(layers=[layer, layer]),
        record=record,
        test=test | dict(run=record),
    )
    if isinstance(data, tuple):
        where, way, junk = data
    else:
        where = data.draw(st.sampled_from(list(files)))
        way, junk = data.draw(st.sampled_from(list(nodes(files[where])))), data.draw(JUNK)
    files[where] = with_node(files[where], way, junk)
    lines = files["log"] if isinstance(files["log"], list) else []
    text = "".join(json.dumps(row) + "\n" for row in lines)
    log.write_text(text[: len(text) - cut])
    (folder / "run" / "pruning.json").write_text(json.dumps(files["report"]))
    (log.parents[1] / "run.json").write_text(json.dumps(files["record"]))
    (folder / "run" / "test.json").write_text(json.dumps(files["test"]))
    run = read_report(folder / "run")
    if isinstance(data, tuple):
        name = dict(log="scalars.json", report="pruning.json", record="run.json", test="test.json")[where]
        assert [name in remark for remark in run.remarks] == [True]
    written = write_report([run], folder / "report", timing=False, samples=0)
    assert all(path.is_file() for path in written)
