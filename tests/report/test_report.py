"""The report on two real runs of a toy network and on folders made by hand: what is read, and what the page holds."""

import csv
import html
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mmengine import Config

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from toy_config import VALIDATION, tiny_config

from mmitp.engine.run import build_runner
from mmitp.engine.run_record import recorded
from mmitp.report import read_run, write_report
from mmitp.report.svg import Line, bar, line_chart, ticks

CONFIG = """
model = dict(type="mmitp.MaskedModel", of="mmdet.Toy")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.5, begin=1 / 15, end=1 / 3, input_shape=(8, 8))]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense and a pruned run of 4 epochs of 5 steps; the pruned one was tested clean and under attack."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("dense", "pruned"):
        cfg = tiny_config(root / name, epochs=4, hook=dict(slim_at_end=True, input_shape=(8, 8)), **VALIDATION)
        if name == "dense":
            cfg.model, cfg.custom_hooks = dict(type="TinyNet"), []
        runner = build_runner(cfg)
        with recorded(runner, f"{name}.py"):
            runner.train()
    robust = dict(
        attack=dict(name="pgd", steps=10, norm="linf"),
        eps=[2.0],
        clean=dict(accuracy=0.75),
        attacked=[dict(accuracy=0.25)],
        run=dict(config="slim/config.py", images=16, command=["tools/test.py", "slim/config.py"]),
    )
    (root / "pruned" / "robustness_pgd10.json").write_text(json.dumps(robust))
    return root / "dense", root / "pruned"


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    files = write_report([read_run(folder) for folder in folders], out, rounds=3)
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def cells(text):
    return {row[0]: row[1:] for row in csv.reader(text.splitlines())}


def test_the_overview_has_each_runs_figures(folders, written):
    rows = cells(written["overview.csv"])
    assert rows[""] == ["dense", "pruned"]
    assert rows["network"] == ["TinyNet, dense", "TinyNet, pruned"]
    # 64 positions times 27 x 8 and 72 x 8 products, and 8 x 2; weights, biases and the norm's two vectors
    dense = 64 * (27 * 8 + 72 * 8) + 16
    assert rows["operations, MACs, dense"] == [f"{dense:,}", f"{dense:,}"]
    assert rows["parameters, dense"] == ["842", "842"]
    frozen = json.loads((folders[1] / "pruning.json").read_text())
    assert rows["operations, MACs, kept"][1] == f"{frozen['macs_kept']:,} ({frozen['macs_kept'] / dense:.4f})"
    assert frozen["macs_kept"] <= dense / 2
    assert rows["steps"] == ["20", "20"]
    assert rows["target"] == ["", "0.5 of the operations"]
    assert float(rows["slimmed network, ms an image"][1]) > 0
    assert rows["slimmed network, ms an image"][0] == ""
    seconds = [json.loads(next(f.glob("*/run.json")).read_text())["processor_seconds"] for f in folders]
    assert rows["training, cost over the dense run's"] == [
        "1.000 (processor time)",
        f"{seconds[1] / seconds[0]:.3f} (processor time)",
    ]


def test_tests_commands_and_channels_are_tables(folders, written):
    tests = list(csv.reader(written["tests.csv"].splitlines()))
    assert tests == [
        ["run", "network", "test", "images", "accuracy"],
        ["pruned", "slimmed", "clean", "16", "0.75"],
        ["pruned", "slimmed", "PGD-10, linf, eps 2/255", "16", "0.25"],
    ]
    commands = list(csv.reader(written["commands.csv"].splitlines()))
    assert {(row[0], row[1]) for row in commands[1:]} == {
        ("dense", "training"),
        ("pruned", "training"),
        ("pruned", "robustness_pgd10.json"),
    }
    assert all("torch " in row[4] for row in commands[1:3])
    layers = {row["name"]: row for row in json.loads((folders[1] / "pruning.json").read_text())["layers"]}
    channels = cells(written["channels_pruned.csv"])
    assert channels["body"][0] == f"{layers['body']['in_kept']} of 8"
    phases = [row[1] for row in csv.reader(written["cost.csv"].splitlines())][1:]
    assert phases == ["whole run", "before the window", "in the window", "after the freeze"]
    for name, text in written.items():  # Markdown has the same cells
        if name.endswith(".csv"):
            for row in csv.reader(text.splitlines()):
                assert "| " + " | ".join(row) + " |" in written["report.md"]


class Page(HTMLParser):
    """Collects elements and complains of tags that do not match."""

    VOID = {"meta", "img", "br", "rect", "path", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_valid_and_asks_for_nothing_from_elsewhere(written):
    page = Page(written["index.html"])
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith(("#", "data:"))
                assert not value.startswith("#") or value[1:] in ids
    style = re.search("<style>(.*?)</style>", written["index.html"], re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed")
    html5lib.HTMLParser(strict=True).parse(written["index.html"])


def test_pictures_can_be_read_out_and_told_apart_without_colour(written):
    svgs = re.findall("<svg.*?</svg>", written["index.html"])
    assert len(svgs) > 4
    assert all('role="img"' in svg and "<title>" in svg for svg in svgs)
    loss = next(svg for svg in svgs if "loss against steps" in svg)
    dashes = re.findall(r'<polyline[^>]*stroke-dasharray="([^"]*)"', loss)
    assert len(dashes) == 2
    assert dashes[0] != dashes[1]
    assert ">dense<" in loss
    assert ">pruned<" in loss


def test_a_chart_puts_values_where_they_belong():
    svg = line_chart([Line("run", [0, 50, 100], [1.0, 0.5, 0.0])], "t", "step", "y", targets=[0.5], spans=[(25, 50)])
    # x from 52 to 390, y from 12 (at 1) to 210 (at 0)
    assert 'points="52.0,12.0 221.0,111.0 390.0,210.0"' in svg
    assert '<path d="M52 111.0H390" class="target"/>' in svg
    assert '<rect x="136.5" y="12" width="84.5"' in svg
    assert line_chart([Line("empty", [], [])], "t", "x", "y") == ""
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]
    assert '<rect x="0" y="0" width="25.0"' in bar(2, 8, "a & b")
    assert "a &amp; b" in bar(2, 8, "a & b")


def by_hand(folder, lines, config=CONFIG):
    log = folder / "20260101_000000" / "vis_data"
    log.mkdir(parents=True)
    (log / "config.py").write_text(config)
    (log / "scalars.json").write_text("\n".join(lines))
    return folder


def line(step, epoch, **more):
    return json.dumps(dict(lr=0.1, loss=1.0 / step, time=2.0, step=step, iter=step, epoch=epoch, **more))


def test_a_control_is_not_taken_for_the_dense_network(folders, tmp_path):
    """Its config is that of a small network without a PruneHook; here it comes first, before the dense run."""
    text = (folders[1] / "slim" / "config.py").read_text()
    control = by_hand(tmp_path / "control", [line(1, 1), line(2, 1)], text)
    write_report([read_run(f) for f in (control, folders[0])], tmp_path / "out", shape=(8, 8), rounds=3, samples=0)
    rows = cells((tmp_path / "out" / "overview.csv").read_text())
    assert rows["network"] == ["TinyNet, small from the start", "TinyNet, dense"]
    assert rows["operations, MACs, dense"][0] == rows["parameters, dense"][0] == ""
    frozen = json.loads((folders[1] / "pruning.json").read_text())
    assert rows["operations, MACs, kept"][0] == f"{frozen['macs_kept']:,}"
    assert rows["dense network, ms an image"][0] == "" != rows["slimmed network, ms an image"][0]
    assert rows["training, cost over the dense run's"][1].startswith("1.000")


def test_damaged_lines_are_left_out_and_said(tmp_path):
    lines = [line(10, 1, ops_kept=1.0), '{"lr": 0.1, "st', "[1]", line(20, 2, ops_kept=0.9)]
    lines += [
        json.dumps({"coco/bbox_mAP": 0.5, "step": 2}),
        json.dumps({"channels_kept/a": 0.5, "step": 20}),
        line(30, 3)[:9],
    ]
    run = read_run(by_hand(tmp_path / "run", lines))
    assert [entry["step"] for entry in run.train] == [10, 20]
    assert run.remarks == ["20260101_000000/vis_data/scalars.json: 3 damaged lines are left out"]
    assert run.validations == [(2, {"coco/bbox_mAP": 0.5})]
    assert run.wall_seconds() == 40.0
    assert run.processor_seconds() is None
    # parts of 12 epochs of 10 steps: from epoch 1 to epoch 4
    assert run.window() == (10.0, 40.0)
    run.hook["by_epoch"] = False  # parts of 120 steps
    assert run.window() == (8.0, 40.0)
    run.hook.update(begin=15, end=33)
    assert run.window() == (15.0, 33.0)


FOREIGN = {
    "backup/config.py": b"this is no python (",
    "src/config.py": b"import not_there\n",
    "code/config.py": b"raise SystemExit(3)\n",
    "binary/config.py": b"\xff\xfe\x00",
}


def test_runs_of_similar_names_have_a_table_each(tmp_path):
    layer = dict(name="", macs_dense=8, macs_kept=4, in_channels=2, in_kept=1, out_channels=2, out_kept=1)
    config = CONFIG.replace("mmitp.MaskedModel", "TinyNet").replace('of="mmdet.Toy"', "")
    names = ["run a", "run_a", "模型", "数据"]
    for name in names:
        folder = by_hand(tmp_path / name, [line(1, 1)], config)
        record = dict(ratio=0.5, ratio_before=0.5, layers=[dict(layer, name=f"of {name}")])
        (folder / "pruning.json").write_text(json.dumps(record), encoding="utf-8")
    runs = [read_run(tmp_path / name) for name in names]
    write_report(runs, tmp_path / "report", timing=False, samples=0)
    tables = [path.read_text(encoding="utf-8") for path in (tmp_path / "report").glob("channels_*.csv")]
    assert sorted(table.splitlines()[1].split(",")[0] for table in tables) == sorted(f"of {name}" for name in names)


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    config = CONFIG.replace('"mmitp.MaskedModel", of="mmdet.Toy"', '"TinyNet"')
    folders = [by_hand(tmp_path / name, [line(1, 1)], config) for name in ("a/run", "b/run", "b/dense")]
    _, report, *_ = write_report([read_run(folder) for folder in folders], tmp_path / "out", timing=False, samples=0)
    assert "| a/run | b/run | dense |" in report.read_text()


def test_a_work_folder_is_no_difference_and_its_name_stays_where_it_means_something_else(tmp_path, monkeypatch):
    (tmp_path / "work_dirs").mkdir()
    config = CONFIG.replace('"mmitp.MaskedModel", of="mmdet.Toy"', '"TinyNet"')
    for name in ("train", "work_dirs/test"):
        more = f"work_dir = '{name}'\nload_from = '{name}/epoch_1.pth'\nsplit = 'train'\ntrain_set = 'data/train'\n"
        by_hand(tmp_path / name, [line(1, 1)], config + more)
    monkeypatch.chdir(tmp_path)
    files = write_report([read_run("train"), read_run("work_dirs/test")], "report", timing=False, samples=0)
    shown, difference = map(html.unescape, re.findall(r"<pre[^>]*>(.*?)</pre>", files[0].read_text(), re.DOTALL))
    assert difference == "no difference"
    assert "train_cfg" in shown
    assert "work_dir='.'" in shown
    assert "load_from='./epoch_1.pth'" in shown
    assert "split='train'" in shown
    assert "train_set='data/train'" in shown


def test_a_frozen_run_is_counted_anew_at_the_size_that_is_asked_for(folders, tmp_path):
    run = read_run(folders[1])
    stem, body = (layer["out_kept"] for layer in run.frozen["layers"][:2])
    files = write_report([run], tmp_path / "a", shape=(16, 16), timing=False, samples=0)
    overview = cells(next(file for file in files if file.name == "overview.csv").read_text())
    assert overview["operations, MACs, dense"] == [f"{256 * 9 * (3 * 8 + 8 * 8) + 16:,}"]
    assert overview["operations, MACs, kept"][0].split()[0] == f"{256 * 9 * (3 * stem + stem * body) + 2 * body:,}"
    assert "operations are stated" not in files[0].read_text()
    run.slim_config = None
    page = write_report([run], tmp_path / "b", shape=(16, 16), timing=False, samples=0)[0].read_text()
    assert "operations are stated for 8x8, as the freeze noted them: no slimmed network is there" in page


@pytest.mark.parametrize("asked", [None, (32, 32)])
def test_runs_of_different_input_sizes_are_told_of(tmp_path, asked):
    config = CONFIG.replace("mmdet.Toy", "TinyNet")
    layer = dict(name="", macs_dense=8, macs_kept=4, in_channels=2, in_kept=1, out_channels=2, out_kept=1)
    for name, size in (("a", "(8, 8)"), ("b", "(16, 8)")):
        folder = by_hand(tmp_path / name, [line(1, 1)], config.replace("(8, 8)", size))
        (folder / "pruning.json").write_text(json.dumps(dict(ratio=0.5, ratio_before=0.5, layers=[layer])))
    runs = [read_run(tmp_path / name) for name in ("a", "b")]
    page = write_report(runs, tmp_path / "report", shape=asked, rounds=1, samples=0)[0].read_text()
    assert "operations are stated for different input sizes: 8x8 (a), 16x8 (b)." in page
    assert f"Latency: one image of {'32x32' if asked else '8x8 (a), 16x8 (b)'}, one thread" in page


def test_a_config_with_infinities_is_read(tmp_path):
    cfg = Config(
        dict(model=dict(type="X"), train_cfg=dict(max_epochs=2), clip=dict(max_norm=math.inf, parts=[-math.inf]))
    )
    by_hand(tmp_path / "run", [line(1, 1)], cfg.pretty_text)
    run = read_run(tmp_path / "run")
    assert run.cfg.clip == dict(max_norm=math.inf, parts=[-math.inf])
    assert set(run.cfg) == {"model", "train_cfg", "clip"}
    assert run.cfg.filename == str(next((tmp_path / "run").rglob("config.py")))
    assert run.remarks == []
    by_hand(tmp_path / "other", [line(1, 1)], "a = inf\nb = nowhere")
    with pytest.raises(ValueError, match=r"other.*config.py cannot be read as a config.*nowhere"):
        read_run(tmp_path / "other")


def test_foreign_files_are_passed_over_and_damaged_ones_said(tmp_path):
    folder = by_hand(tmp_path / "run", [line(step, 1) for step in range(1, 4)])
    for name, content in {
        **FOREIGN,
        "slim/config.py": b"model = dict(type='mmitp.SlimModel'",
        "exits/config.py": b"kind = 'SlimModel'\nraise SystemExit(3)\n",
        "last_checkpoint": b"\xff\xfe\x00",
        "epoch_1.pth": b"",
        "99990101_000000/vis_data/scalars.json": line(4, 1).encode(),
        "99990101_000000/vis_data/config.py": b"model = dict(type='Tiny",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    run = read_run(folder)
    assert (len(run.train), run.pruned, run.checkpoint) == (4, True, folder / "epoch_1.pth")
    said = [remark.split(" cannot be read as a config: ")[0] for remark in run.remarks]
    assert said == [str(folder / name / "config.py") for name in ("99990101_000000/vis_data", "exits", "slim")]
    assert not any("\n" in remark for remark in run.remarks)
    (folder / "last_checkpoint").write_text("x" * 4000)
    assert read_run(folder).checkpoint == folder / "epoch_1.pth"

    for path in folder.glob("*/vis_data/config.py"):
        path.write_text("model = dict(")
    with pytest.raises(ValueError, match="no config says what was trained .*; .*SyntaxError"):
        read_run(folder)


def test_a_run_without_a_training_loop_is_read(tmp_path):
    run = read_run(by_hand(tmp_path / "run", [line(1, 1)], config="model = dict(type='Toy')\n"))
    assert (run.by_epoch, run.window()) == (False, None)


@pytest.mark.parametrize(
    ("config", "recorded", "network"),
    [
        ("mine/config.py", False, "masked"),
        ("slim/other.py", True, "slimmed"),
        ("slim/config.py", None, "slimmed"),  # by name, and so below: files from before it was recorded
        ("slim/other.py", None, "masked"),
        ("code/config.py", None, "masked"),  # it is there, and builds no slimmed network
    ],
)
def test_a_network_is_called_slimmed_where_it_is(config, recorded, network, tmp_path):
    folder = by_hand(tmp_path / "run", [line(1, 1)])
    (folder / "code").mkdir()
    (folder / "code" / "config.py").write_text("model = dict(type='mmdet.Toy')\n")
    measured = dict(config=config) | ({} if recorded is None else dict(slimmed=recorded))
    (folder / "test.json").write_text(json.dumps(dict(accuracy=0.5, run=measured)))
    assert [result.network for result in read_run(folder).results] == [network]


def test_a_dense_run_has_no_slimmed_network(tmp_path):
    folder = by_hand(tmp_path / "run", [line(1, 1)], config="model = dict(type='Toy')\n")
    (folder / "test.json").write_text(json.dumps(dict(accuracy=0.5, run=dict(config="mine/config.py"))))
    assert [result.network for result in read_run(folder).results] == ["dense"]


def test_lines_of_a_resumed_run_take_the_place_of_those_it_repeats(tmp_path):
    folder = by_hand(tmp_path / "run", [line(10, 1), line(20, 2), line(30, 3)])
    later = folder / "20260102_000000" / "vis_data"
    later.mkdir(parents=True)
    (later / "scalars.json").write_text(line(20, 2, resumed=1))
    run = read_run(folder)
    assert [entry.get("resumed") for entry in run.train] == [None, 1, None]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: None, "is no folder: give the work folder of a run"),
        (lambda folder: folder.mkdir(), "is no run: it holds no"),
        (lambda folder: (by_hand(folder, [line(1, 1)]) / "20260101_000000/vis_data/config.py").unlink(), "no .*config"),
    ],
)
def test_what_is_no_run_is_refused_in_one_paragraph(make, text, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=text) as error:
        read_run(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_names_are_escaped(tmp_path):
    runs = [read_run(by_hand(tmp_path / name, [line(10, 1, ops_kept=1.0)])) for name in ("a<b>&c", "d|e")]
    for run in runs:
        run.cfg.model = dict(type="TinyNet")
    files = write_report(runs, tmp_path / "out", timing=False)
    page = files[0].read_text()
    assert "<b>&c" not in page
    assert "a&lt;b&gt;&amp;c" in page
    assert "d\\|e" in files[1].read_text()
    assert all(re.fullmatch(r"[\w.-]+", file.name) for file in files)
    with pytest.raises(ValueError, match=r"a<b>&c is given twice"):
        write_report([runs[0], runs[0]], tmp_path / "out")


@pytest.mark.parametrize("width", [360, 1200])
def test_chromium_shows_the_page_on_a_phone_and_on_a_desk_without_the_network(width, folders, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    files = write_report([read_run(folder) for folder in folders], tmp_path, timing=False)
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=dict(width=width, height=700))
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda message: failed.append(message.text))
        page.goto(files[0].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        chart = page.locator("svg.chart").first.bounding_box()
        assert 300 < chart["width"] <= 660
        assert page.locator("svg.bar").first.bounding_box()["width"] > 60
        assert page.get_by_role("heading", name="Channels kept").is_visible()
        browser.close()
    assert asked == [files[0].as_uri()]
    assert failed == []
