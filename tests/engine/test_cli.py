"""The edge of the tools: which errors are the user's, and what becomes of them."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from mmitp.engine.cli import UserError, command, non_negative, parser, positive, torch_device
from mmitp.engine.results import check_writable
from mmitp.evaluation.kitti_ap import read_split

TOOLS = sorted(path for path in (Path(__file__).parents[2] / "tools").glob("*.py"))


def tool(body: Callable[[], None]) -> Callable[..., int]:
    @command
    def main(argv: Sequence[str] | None = None) -> None:
        parser("a tool").parse_args(argv)
        body()

    return main


def answer(body: Callable[[], None], capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        tool(body)(list(argv))
    return int(str(done.value.code)), capsys.readouterr().err


def refuse() -> None:
    raise UserError("no such option: take another")


def test_a_users_mistake_is_one_paragraph_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert answer(refuse, capsys) == (2, "test_cli.py: no such option: take another\n")
    assert answer(lambda: read_split(tmp_path / "no.txt") and None, capsys) == (
        2,
        f"test_cli.py: {tmp_path / 'no.txt'}: No such file or directory\n",
    )
    status, text = answer(lambda: check_writable(tmp_path) and None, capsys)
    assert (status, text.count("\n"), "is a folder" in text) == (2, 1, True)


def test_traceback_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = answer(refuse, capsys, "--traceback")
    assert status == 2
    assert "Traceback" in text
    assert text.endswith("test_cli.py: no such option: take another\n")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/net.pth", "https://no.such.host.invalid/net.pth"])
def test_weights_that_cannot_be_fetched_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    from mmengine.runner.checkpoint import load_checkpoint
    from torch import nn

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    status, text = answer(lambda: load_checkpoint(nn.Linear(1, 1), address) and None, capsys)
    assert (status, text.count("\n")) == (2, 1)
    assert text.startswith(f"test_cli.py: {address} cannot be fetched (")
    assert f"put the file into {tmp_path}/hub/checkpoints, or leave it out: --cfg-options" in text


def test_a_failed_check_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    def differs() -> None:
        raise RuntimeError("the file differs from torch")

    assert answer(differs, capsys) == (1, "test_cli.py: the file differs from torch\n")


def test_libraries_that_wrap_our_error_do_not_hide_it(capsys: pytest.CaptureFixture[str]) -> None:
    def wrapped() -> None:
        try:
            refuse()
        except UserError as error:
            exec("raise TypeError('class X in module y: no such option')", {"error": error})  # a library's frame

    assert answer(wrapped, capsys)[1] == "test_cli.py: no such option: take another\n"


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmpretrain"])
def test_what_mmengine_says_of_a_config_is_the_users(scope: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mmengine.registry import HOOKS, DefaultScope

    def answered(**part: object) -> tuple[int, str]:
        with DefaultScope.overwrite_default_scope(scope):
            return answer(lambda: HOOKS.build(part), capsys)

    status, text = answered(type="mmitp.PruneHok")
    assert (status, text.count("\n")) == (2, 1)
    assert "PruneHok is not in the" in text
    assert text.endswith("(the nearest name is 'mmitp.PruneHook')\n")
    assert "nearest" not in answered(type="Zzzz")[1]
    status, text = answered(type="mmitp.PruneHook", targett=0.5)
    assert (status, text.count("\n")) == (2, 1)
    assert text.endswith("unexpected keyword argument 'targett' (the nearest name is 'target')\n")


def test_what_other_peoples_classes_say_of_a_config_is_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS

    def optimizer() -> None:
        build_optim_wrapper(torch.nn.Linear(1, 1), dict(optimizer=dict(type="SGD", lr=-1)))

    status, text = answer(optimizer, capsys)
    assert (status, text) == (
        2,
        "test_cli.py: the config's 'SGD' cannot be built: ValueError: Invalid learning rate: -1\n",
    )

    @MODELS.register_module(force=True)
    class Broken:
        def __init__(self) -> None:
            exec("raise AttributeError('deep inside a library')")

    status, text = answer(lambda: MODELS.build(dict(type="Broken")), capsys)
    assert (status, "'Broken' cannot be built: AttributeError" in text) == (2, True)


def lacking() -> None:
    {}["key"]  # type: ignore[index]


def foreign() -> None:
    exec("raise ValueError('deep inside a library')")


@pytest.mark.parametrize(("defect", "kind"), [(lacking, KeyError), (foreign, ValueError)])
def test_a_defect_keeps_its_traceback(defect: Callable[[], None], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        tool(defect)([])


def test_status_of_a_tool_that_ends_well() -> None:
    assert tool(lambda: None)([]) == 0


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [(positive, ["1", "32"], ["0", "-1", "x", "1.5"]), (non_negative, ["0", "8.5"], ["-1", "nan", "inf", "x"])],
)
def test_numbers_of_options(kind: Callable[[str], float], good: list[str], bad: list[str]) -> None:
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_devices_that_are_not_there_are_named() -> None:
    assert torch_device("cpu") == "cpu"
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"no device '{name}' here"):
            torch_device(name)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_every_tool_has_the_edge(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(path)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert "--traceback" in capsys.readouterr().out
    assert hasattr(module.main, "__wrapped__")


CIFAR = str(Path(__file__).parents[2] / "configs" / "cifar10" / "resnet20_cifar10_short.py")


@pytest.mark.parametrize(
    ("name", "argv", "says"),
    [
        ("convert_resnet_cifar", ["nofile.th", "out.pth"], "no checkpoint file 'nofile.th'"),
        ("convert_resnet_cifar", ["text.txt", "out.pth"], "text.txt is not a checkpoint"),
        ("profile_latency", [CIFAR, "--out", "t.json", "--device", "cuda:99"], "no device 'cuda:99' here"),
        ("profile_latency", [CIFAR, "--out", "text.txt/t.json"], "cannot be written"),
        ("profile_latency", [CIFAR, "--out", "t.json", "--batch", "0"], "--batch: must be at least 1"),
        ("train", ["nofile.py"], "no config file 'nofile.py'"),
        ("train", ["text.txt"], "text.txt cannot be read as a config"),
        ("train", [CIFAR], "train_dataloader: no folder"),
        ("train", [CIFAR, "--cfg-options", "optim_wraper.x=1"], "the nearest is 'optim_wrapper'"),
        ("train", [CIFAR, "--launcher", "pytorch"], "RANK, WORLD_SIZE, MASTER_ADDR not set"),
        ("train", ["empty.py"], "there is nothing to train on"),
        (
            "train",
            [CIFAR, "--cfg-options", "custom_hooks.0.type=mmitp.PruneHook"],
            "custom_hooks must be a list of hooks",
        ),
        ("train", [CIFAR, "--cfg-options", "train_dataloader.batch_size=0"], "batch_size must be a whole number of at"),
        ("slim", ["empty.py", "text.txt", "out"], "empty.py has no model: there is nothing to slim"),
        ("export", ["empty.py", "text.txt", "out.pt"], "empty.py has no model: there is nothing to export"),
        ("test", ["empty.py", "text.txt"], "there is nothing to test on"),
        ("test", [CIFAR, "nofile.pth"], "no checkpoint file 'nofile.pth'"),
        ("slim", [CIFAR, "nofile.pth", "out"], "not 'mmitp.MaskedModel'"),
        ("slim", [CIFAR, "nofile.pth", "text.txt"], "cannot be written"),
        ("export", [CIFAR, "nofile.pth", "."], "is a folder"),
        ("export", [CIFAR, "nofile.pth", "out.onnx"], "no checkpoint file 'nofile.pth'"),
        ("prune_report", ["empty.py"], "has no model: there is nothing to report on"),
        ("prune_report", ["mmdet::no/such_config"], "mmdet has no config"),
        ("check_signs", ["nofolder"], "nofolder"),
        ("report", ["nofolder"], "nofolder is no folder: give the work folder of a run"),
        ("report", ["."], ". is no run: it holds no"),
        ("eval_kitti", ["nofolder", "."], "nofolder is not a folder"),
        ("make_scenes", ["text.txt", "--frames", "2", "--size", "96", "32"], "text.txt"),
        ("demo", ["--work-dir", "text.txt"], "cannot be written"),
    ],
)
def test_mistakes_at_every_tool(
    name: str,
    argv: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty.py").write_text("a = 1\n")
    main = load(next(path for path in TOOLS if path.stem == name)).main
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_light_tools_stay_light() -> None:
    code = "import sys, mmitp.engine.cli, mmitp.engine.results; print({'torch', 'mmengine'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
