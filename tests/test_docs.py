"""Pages do what they say: links lead somewhere, tables are those of the committed files, and every command runs."""

from __future__ import annotations

import argparse
import importlib
import pickle
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmitp import commands
from mmitp.engine.config import load_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
tables = importlib.import_module("tables")

PAGES = tables.pages()
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (mmitp [a-z-]+ (?:.*\\\n)*.*)$", re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)) for title in titles)
    return {title.strip().lower().replace(" ", "-") for title in plain}


# -- links, navigation, tables


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_sections(page: Path) -> None:
    for link in LINK.finditer(prose(page.read_text(encoding="utf-8"))):
        target, _, section = (link[1] or link[2]).partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name(page)}: {link[0]}"
        assert not section or section in anchors(file), f"{name(page)}: {link[0]}"


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def leaves(node: Any) -> Iterator[str]:
        for value in node.values() if isinstance(node, dict) else node:
            yield from [value] if isinstance(value, str) else leaves(value)

    assert sorted(leaves(site["nav"])) == sorted(
        p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")
    )


def test_every_table_is_what_the_committed_files_say(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()
    used = {name for page in PAGES for name in tables.names(page.read_text(encoding="utf-8"))}
    assert {path.stem for path in tables.RESULTS.glob("*.json")} <= used, "a file of results that no page shows"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_no_figure_of_a_table_is_typed_by_hand(page: Path) -> None:
    text = re.sub(r"<!-- ([\w-]+):begin -->.*?<!-- \1:end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    if "Made by `python benchmarks/" in text:  # a whole page that a script writes, and checks
        return
    for line in prose(text).splitlines():
        if line.startswith("|"):
            bare = re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
            assert not re.search(r"(?<![\w.])\d+\.\d\d+(?![\w.])", bare), f"{name(page)}: {line}"


def test_a_wrong_figure_and_a_table_from_nowhere_are_noticed(tmp_path: Path) -> None:
    path = ROOT / "benchmarks" / "README.md"
    text = path.read_text(encoding="utf-8")
    assert tables.filled(text, "a page") == text
    assert "1.018" in text
    assert tables.filled(text.replace("1.018", "1.017"), "a page") == text
    for wrong in ("<!-- no_such:begin -->\n<!-- no_such:end -->", "<!-- step_cost:begin -->", text + text):
        with pytest.raises(SystemExit, match="a page"):
            tables.filled(wrong, "a page")


def test_cells_are_shown_as_their_columns_say() -> None:
    column = {"title": "cost: min / median / max", "decimals": 2, "join": " / "}
    assert tables.cell([0.9, 1, 1.118], column) == "0.90 / **1.00** / 1.12"
    assert tables.cell(1234567, {"title": "MACs"}) == "1,234,567"
    assert tables.cell([73, None], {"title": "share", "join": " / ", "suffix": " %"}) == "73 % / -"
    assert tables.cell("text", column) == "text"


def test_the_front_page_is_short_and_shows_what_has_run(tmp_path: Path) -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    timed = dict(ms=2.0, dense_ms=3.4, ratio=[0.5, 0.6, 0.7])
    run = dict(state="finished", config="c", ops_kept=0.5, params_kept=0.25, relative_cost=1.1, latency=timed)
    for file, content in {
        "small_s0": run | dict(accuracy=80.0),
        "small_s1": run | dict(accuracy=81.0, ops_kept=0.4),
        "small_s2": run | dict(state="running", accuracy=0.0),
    }.items():
        (tmp_path / f"{file}.json").write_text(str(content).replace("'", '"'))
    networks = {"dense": "dense", "small": "pruned", "none": "never run"}
    rows = lambda: tables.front_rows("job", "page.md", lambda r: r["accuracy"], networks, tmp_path)  # noqa: E731
    assert rows() == []  # nothing to compare with
    dense = run | dict(accuracy=90.0, ops_kept=1, params_kept=1)
    del dense["latency"]
    (tmp_path / "dense_s0.json").write_text(str(dense).replace("'", '"'))
    assert rows() == [
        ["[job](page.md)", "dense", "90.00 (1)", "1.000", "1.000", "-", "1.00"],
        ["", "pruned", "80.50 (2)", "0.450", "0.250", "0.60", "1.10"],
    ]


GOSSIP = ("session", "busy machine", "machine was busy", "two trainings", "the clock cannot be asked", "helper")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("CHANGELOG.md", "CONTRIBUTING.md")], ids=name)
def test_pages_say_nothing_about_who_was_where(page: Path) -> None:
    text = page.read_text(encoding="utf-8").lower()
    assert [word for word in GOSSIP if re.search(rf"\b{word}\b", text) and "inferencesession" not in text] == []


# -- commands


def lines(block: str) -> Iterator[list[str]]:
    """The words of a block's commands, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words


def mmitp_words(words: list[str]) -> list[str] | None:
    """The arguments of ``mmitp``, however the page starts it; ``None`` for other programs."""
    if words[0] == "mmitp":
        return words[1:]
    if words[0] == "python" and "-m" in words and words[words.index("-m") + 1] == "torch.distributed.run":
        words = ["python", *words[next(i for i, w in enumerate(words) if w == "mmitp" or w.startswith("tools/")) - 1 :]]
    if words[:3] == ["python", "-m", "mmitp"]:
        return words[3:]
    if words[0] == "python" and (tool := next((w for w in words[1:3] if w.startswith("tools/")), None)) is not None:
        stem = Path(tool).stem
        rest = words[words.index(tool) + 1 :]
        return None if stem == "demo" else [dict(profile_latency="profile").get(stem, stem).replace("_", "-"), *rest]
    return None


def documented() -> list[tuple[str, list[str]]]:
    """Page and words of every command of mmitp that a page shows."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [body for kind, body in FENCE.findall(text) if kind == "bash"]
        blocks += INDENTED.findall(FENCE.sub("", text))
        for block in blocks:
            found += [(name(page), argv) for words in lines(block) if (argv := mmitp_words(words)) is not None]
    return found


class Parsed(Exception):
    """Stops a command once it has read its arguments."""


def test_every_command_that_a_page_shows_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any) -> None:
        original(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    shown = documented()
    assert len(shown) > 40
    for page, argv in shown:
        argv = [word for word in argv if word != "..."]
        assert argv[0] in commands.names(), f"{page}: mmitp {shlex.join(argv)}"
        try:
            commands.main(argv)
        except Parsed:
            continue
        except SystemExit:
            pytest.fail(f"{page}: mmitp {shlex.join(argv)}")


TOY = """
_base_ = ["mmitp::cifar10/resnet20_cifar10_psi50_short.py"]
model = dict(backbone=dict(depth=8, base_channels=4), head=dict(in_channels=16))
train_dataloader = dict(batch_size=4, dataset=dict(data_root={data!r}))
val_dataloader = dict(batch_size=4, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=3, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
auto_scale_lr = dict(base_batch_size=8)
log_level = "ERROR"
custom_hooks = [dict(type="mmitp.PruneHook", target=0.5, begin=1, end=2)]
"""
ROBUST = TOY + 'custom_hooks = [dict(type="mmitp.AdversarialHook", eps=8, alpha=10), *custom_hooks]\n'
CAR = "Car 0.00 0 0 {0}.00 10.00 {1}.00 60.00 -1 -1 -1 -1000 -1000 -1000 -10"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guides' commands run in seconds: eight images, a ResNet-8, three frames of KITTI."""
    folder = tmp_path_factory.mktemp("toy")
    data = folder / "cifar-10-batches-py"
    data.mkdir()
    rng = np.random.default_rng(0)
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (data / file).write_bytes(pickle.dumps({"data": images, "labels": [0, 1, 2, 3]}))
    for file, text in (("my_prune50", TOY), ("my_robust", ROBUST)):
        (folder / f"{file}.py").write_text(text.format(data=str(folder)))
    kitti = folder / "data" / "kitti"
    for where in (kitti / "training" / "label_2", kitti / "ImageSets", folder / "RESULTS", folder / "OTHER_RESULTS"):
        where.mkdir(parents=True)
    for frame in ("000000", "000001", "000002"):
        (kitti / "training" / "label_2" / f"{frame}.txt").write_text(CAR.format(100, 200) + "\n")
        (folder / "RESULTS" / f"{frame}.txt").write_text(CAR.format(100, 200) + " 0.9\n")
        (folder / "OTHER_RESULTS" / f"{frame}.txt").write_text(CAR.format(150, 250) + " 0.9\n")
    (kitti / "ImageSets" / "val.txt").write_text("000000\n000001\n000002\n")
    return folder


def at_toy_size(argv: list[str]) -> list[str] | None:
    """A guide's command on the toy; ``None`` for what a toy cannot do: it has no boxes, it is one process, and its time
    is all overhead (``tests/engine/test_prune_hook_cost.py`` trains by a latency table).
    """
    if {"--objective", "--launcher", "custom_hooks.0.cost.type=latency"} & set(argv):
        return None
    words = []
    for word in argv:
        if word.startswith("mmdet::") or word == "CONFIG" or word.startswith("configs/"):
            word = "my_robust.py" if "robust" in word else "my_prune50.py"
        elif word == "CHECKPOINT" or re.fullmatch(r"work_dirs/my_prune50/epoch_\d+\.pth", word):
            word = "work_dirs/my_prune50/epoch_3.pth"
        words.append(word)
    for option, count, small in (("--shape", 2, ["32", "32"]), ("--max-images", 1, ["4"]), ("--steps", 1, ["2"])):
        if option in words:
            at = words.index(option) + 1
            words[at : at + count] = small
    return words


GUIDES = ("README.md", "docs/index.md", "docs/prune.md", "docs/robustness.md", "docs/deployment.md", "docs/compare.md")


def test_every_command_of_the_guides_runs_at_toy_size(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy)
    done: set[tuple[Any, ...]] = set()
    for page, shown in documented():
        argv = at_toy_size(shown) if page in GUIDES else None
        if argv is None:
            continue
        # Once for each use: what differs in values only (another size of the attack, say) shows nothing new.
        uses = [w for w in argv if w.startswith("--") or w in ("pgd", "fgsm", "autoattack") or "." in Path(w).name]
        if (use := (argv[0], *uses)) in done:
            continue
        done.add(use)
        try:
            status = commands.main(argv)
        except SystemExit as error:
            status = error.code  # type: ignore[assignment]
        said = capsys.readouterr()
        assert status == 0, f"{page}: mmitp {shlex.join(argv)}\n{said.err[-2000:]}"
    assert len(done) >= 20
    for made in ("slim50/config.py", "slim50.onnx", "slim50.pt2", "slim50.pt", "slim50/metrics.json", "table.json"):
        assert (toy / made).is_file(), made
    assert len(list((toy / "slim50" / "pictures").iterdir())) == 4
    assert (toy / "work_dirs" / "my_prune30" / "pruning.json").is_file()


def test_the_python_of_the_guides_is_python(toy: Path) -> None:
    """Configs are read, scripts compiled: names and calls are tests' of their own."""
    count = 0
    for page in PAGES:
        for kind, body in FENCE.findall(page.read_text(encoding="utf-8")):
            if kind == "python":
                compile(body, name(page), "exec")
                count += 1
                if body.startswith("_base_ = ["):
                    file = toy / f"block{count}.py"
                    file.write_text(body)
                    assert load_config(str(file)).model.type
    assert count >= 5


def test_quantising_a_slimmed_network_as_the_guide_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    runtime = importlib.import_module("onnxruntime")
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    torch.onnx.export(model, x, "slim50.onnx", input_names=["images"], output_names=["y"], dynamo=False)
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    block = next(body for kind, body in FENCE.findall(page) if "quantize_static" in body)
    exec(compile(block, "deployment.md", "exec"), dict(batches=[x.numpy()] * 4))
    assert quantization is not None
    session = runtime.InferenceSession("slim50_int8.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.abs(y - wanted).max() < 0.1 * np.abs(wanted).max()
