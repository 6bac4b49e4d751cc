"""The console command: its subcommands, their quick help, and the options that they share."""

from __future__ import annotations

import ast
import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import mmitp
from mmitp import commands
from mmitp.engine.cli import add_config, add_out, command, needs_out, parser

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "torchvision", "mmengine", "mmcv", "mmdet", "mmpretrain", "cv2", "matplotlib", "onnx", "onnxruntime"}


def test_help_of_every_command_is_quick_and_loads_nothing_heavy() -> None:
    code = f"""
import contextlib, io, sys
from mmitp import commands
assert commands.main(["--help"]) == 0
for name in commands.names():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        commands.main([name, "--help"])
    assert said.getvalue().startswith("usage: mmitp " + name), name
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    # Processor time, which other work on the machine does not lengthen, of all commands together.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    for name, module in commands.names().items():
        summary = importlib.import_module(module).__doc__.splitlines()[0]
        assert f"  {name}" in done.stdout
        assert summary in done.stdout
        assert len(summary) <= 100


def test_what_it_says_to_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["trian"]) == 2
    assert "no command 'trian'; the nearest is train\n" in capsys.readouterr().err
    assert commands.main([]) == 2
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmitp {mmitp.__version__}\n"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_module_answers_as_the_command_does(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main([option]) == 0
    done = subprocess.run([sys.executable, "-m", "mmitp", option], capture_output=True, text=True, check=True)
    assert done.stdout == capsys.readouterr().out


def test_a_users_mistake_is_named_after_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        commands.main(["eval-kitti", str(tmp_path / "none"), "."])
    assert capsys.readouterr().err.startswith("mmitp eval-kitti: ")


def test_python_m_mmitp_runs_a_command_and_a_script(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "mmitp"]
    done = subprocess.run([*run, "train", "none.py", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[0][:18]) == (0, "usage: mmitp train")
    (tmp_path / "train").write_text("print('a script')")
    done = subprocess.run([*run, "./train"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "a script\n"
    done = subprocess.run([*run, "nothing"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "no file and no command 'nothing'" in done.stderr) == (2, True)


@pytest.mark.parametrize("tool", sorted(p for p in (ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_every_tool_of_a_checkout_is_a_command(tool: Path) -> None:
    if tool.stem == "demo":  # drives the others, from a checkout only
        return
    module = f"mmitp.commands.{dict(profile_latency='profile').get(tool.stem, tool.stem)}"
    tree = ast.parse(tool.read_text())
    imported = {n.module: [a.name for a in n.names] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported[module] == ["main"]
    assert module in commands.names().values()
    assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def test_every_command_that_reads_a_config_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    readers = set()
    for name in commands.names():
        with pytest.raises(SystemExit, match="0"):
            commands.main([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        if " config config file" in text or " config config of" in text or " config config the" in text:
            readers.add(name)
            assert "--cfg-options KEY=VALUE" in text, name
    assert readers >= {"export", "profile", "prune-report", "slim", "test", "train"}


def test_overrides_are_read_by_mmengines_action() -> None:
    options = parser("a command")
    add_config(options)
    given = options.parse_args(
        "c.py --cfg-options a.b=1 a.c=[1,2.5,(x,None)] --cfg-options d=True a.b=2".split()  # the last one counts
    )
    assert given.cfg_options == {"a.b": 2, "a.c": [1, 2.5, ("x", None)], "d": True}
    assert options.parse_args(["c.py"]).cfg_options == {}
    for wrong in ("a", "a..b=1", "=1", "a=(1,2"):
        with pytest.raises(ValueError, match="--cfg-options"):
            options.parse_args(["c.py", "--cfg-options", wrong])


def test_where_results_go_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    options = parser("a command")
    options.add_argument("source")
    add_out(options, "what", "--json", positional=True)
    for line in ("s --out o", "--out o s", "s --json o", "s o"):
        args = options.parse_args(line.split())
        assert (args.source, args.out) == ("s", "o"), line
        needs_out(options, args)
    for line, says in (("s o --out p", "given twice: o and p"), ("s --out o --json p", "given twice: o and p")):
        with pytest.raises(SystemExit, match="2"):
            options.parse_args(line.split())
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        needs_out(options, options.parse_args(["s"]))
    assert "required: --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "how"),
    [("torch", "torch numpy"), ("mmdet", '-e ".[mm]"'), ("onnxruntime", '-e ".[export]"')],
)
def test_a_package_that_is_not_installed_is_named_with_what_brings_it(
    package: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(argv: object = None) -> None:
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    with pytest.raises(SystemExit, match="2"):
        main([])
    said = capsys.readouterr().err
    assert f"{package} is not installed, which this command needs: pip install {how} (docs/faq.md)" in said


@pytest.mark.parametrize(
    ("script", "args", "runs"),
    [
        ("dist_train.sh", ["c.py", "8", "--amp"], ["train.py", "c.py", "--launcher", "pytorch", "--amp"]),
        ("dist_test.sh", ["c.py", "w.pth", "2"], ["test.py", "c.py", "w.pth", "--launcher", "pytorch"]),
    ],
)
def test_mmdets_scripts_for_several_gpus(script: str, args: list[str], runs: list[str]) -> None:
    show = {**os.environ, "PYTHON": "echo", "NNODES": "2", "NODE_RANK": "1", "PORT": "29501"}
    command = ["bash", str(ROOT / "tools" / script), *args]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=show).stdout.split()
    launcher = "-m torch.distributed.run --nnodes 2 --node_rank 1 --nproc_per_node".split()
    assert said[: len(launcher) + 1] == [*launcher, next(a for a in args if a.isdecimal())]
    place = said.index(str(ROOT / "tools" / runs[0]))
    assert said[place + 1 :] == runs[1:]
    assert said[place - 4 : place] == ["--master_addr", "127.0.0.1", "--master_port", "29501"]
    assert subprocess.run(command[:3], capture_output=True).returncode == 2


def test_citation_and_workflow() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mmitp.__version__
    assert citation["preferred-citation"]["authors"][0]["family-names"] == "Vemparala"
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert json.dumps(citation)  # plain values only
