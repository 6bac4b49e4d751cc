"""Do the tests notice when one token of the code changes?

    python benchmarks/mutation.py lines [tests/pruning ...]
    python benchmarks/mutation.py run mmitp/attacks mmitp/evaluation/kitti_ap.py --mutants 100 --seed 0 [--out FILE]

``lines`` runs the tests under coverage.py and notes which test runs which line of ``mmitp/``, and for how long. ``run``
draws mutants at random (comparisons, arithmetic, constants, conditions, results) and runs each against the quickest
tests of its line, ``--seconds`` of them at most, in a fork. A mutant is ``noticed`` if a test fails or does not end,
``survived`` if all pass, and ``unreached`` if no test runs its line. Results are written one by one; a run that was
stopped goes on. A survivor is either a gap in the tests, or changes nothing: somebody has to look at it.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "work_dirs" / "mutation"
#: what is imported before the forks, once
WARM = ("torch", "numpy", "hypothesis")

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = dict(min="max", max="min", any="all", all="any")
#: parts of a program whose changes no test should notice: types, texts of errors
LEFT_ALONE = {"annotation", "returns", "decorator_list", "exc"}


class Mutant(NamedTuple):
    file: str
    line: int
    statement: int  # the line where its statement begins
    before: str
    after: str
    code: Any


# -- mutants


def others(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield ast.Compare(node.left, [SWAPS[type(op)]()], node.comparators)
        case ast.BinOp(op=op) if type(op) in SWAPS and not isinstance(node.left, ast.Constant | ast.JoinedStr):
            yield ast.BinOp(node.left, SWAPS[type(op)](), node.right)
        case ast.BoolOp(op=op):
            yield ast.BoolOp(SWAPS[type(op)](), node.values)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield ast.Call(ast.Name(NAMES[name], ast.Load()), node.args, node.keywords)
        case ast.If() | ast.IfExp() | ast.While():
            yield type(node)(**{**dict(ast.iter_fields(node)), "test": ast.UnaryOp(ast.Not(), node.test)})
        case ast.Return(value=ast.AST() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))


def places(node: ast.AST, statement: int = 1) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, int]]:
    """Every node below ``node`` whose change matters, with what holds it and the line where its statement begins."""
    for field, value in ast.iter_fields(node):
        if field in LEFT_ALONE or isinstance(node, ast.JoinedStr):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                begin = child.lineno if isinstance(child, ast.stmt) else statement
                yield node, field, index, child, begin
                yield from places(child, begin)


def mutants(path: str, source: str) -> Iterator[Mutant]:
    """Every program that differs from ``source`` in one place."""
    tree = ast.parse(source)
    for parent, field, index, node, statement in list(places(tree)):
        for other in others(node):
            ast.fix_missing_locations(ast.copy_location(other, node))
            _put(parent, field, index, other)
            try:
                code = compile(tree, path, "exec")
            finally:
                _put(parent, field, index, node)
            line: int = node.lineno  # type: ignore[attr-defined]
            yield Mutant(path, line, statement, _first_line(node), _first_line(other), code)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


# -- which test runs which line


class Recorder:
    """A pytest plugin: coverage's context is the test that runs; seconds a test."""

    def __init__(self, cov: coverage.Coverage) -> None:
        self.cov, self.seconds = cov, dict[str, float]()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.cov.switch_context(item.nodeid.split("[")[0])
        yield
        self.cov.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("[")[0]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration


def lines(args: argparse.Namespace) -> int:
    WORK.mkdir(parents=True, exist_ok=True)
    cov = coverage.Coverage(data_file=str(WORK / "coverage"), source=["mmitp"], config_file=False)
    cov.erase()
    cov.start()
    recorder = Recorder(cov)
    code = pytest.main([*args.tests, "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    cov.stop()
    cov.save()
    (WORK / "seconds.json").write_text(json.dumps(recorder.seconds), encoding="utf-8")
    return int(code)


class Reached:
    """The tests of a line, the quickest first; of a line that runs at import those of the whole file."""

    def __init__(self) -> None:
        self.data = coverage.CoverageData(str(WORK / "coverage"))
        self.data.read()
        self.seconds: dict[str, float] = json.loads((WORK / "seconds.json").read_text(encoding="utf-8"))

    def tests(self, mutant: Mutant) -> list[str]:
        contexts = self.data.contexts_by_lineno(str(ROOT / mutant.file))
        ran = {*contexts.get(mutant.line, []), *contexts.get(mutant.statement, [])}
        if ran == {""}:
            ran = {name for each in contexts.values() for name in each}
        return sorted(ran - {""}, key=lambda name: self.seconds[name])


# -- a mutant against its tests


def in_a_fork(arguments: list[str], seconds: int, mutant: Mutant | None = None) -> int:
    """Exit status of pytest, negative for a signal, with the mutant's code in place of its file's."""
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))  # an endless loop ends, too
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if mutant is not None:
            whole, get_code = str(ROOT / mutant.file), SourceFileLoader.get_code
            SourceFileLoader.get_code = lambda self, name: (  # type: ignore[method-assign]
                mutant.code if self.path == whole else get_code(self, name)
            )
        status = 1
        try:
            status = int(pytest.main([*arguments, "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]))
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    try:
        os.killpg(child, signal.SIGKILL)  # what its tests have started
    except ProcessLookupError:
        pass
    return os.waitstatus_to_exitcode(waited)


def outcome(mutant: Mutant, tests: list[str], seconds: float) -> str:
    if not tests:
        return "unreached"
    return "noticed" if in_a_fork([*tests, "-x"], int(60 + 4 * seconds), mutant) else "survived"


def run(args: argparse.Namespace) -> int:
    files = [p for name in args.files for p in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))]
    every = [m for p in sorted(files) for m in mutants(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8"))]
    print(f"{len(every)} mutants of {len(files)} files")
    random.Random(args.seed).shuffle(every)
    out = Path(args.out)
    results: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    if [(row["file"], row["line"]) for row in results] != [m[:2] for m in every[: len(results)]]:
        raise SystemExit(f"{out} holds mutants of another draw: give the same files and seed, or another --out")
    reached = Reached()
    for name in WARM:
        __import__(name)
    assert not [name for name in sys.modules if name.split(".")[0] == "mmitp"]
    # Else a mutant would count as noticed because of tests that are not there any more.
    if in_a_fork([*reached.seconds, "--collect-only"], 600):
        raise SystemExit("pytest does not find the tests that `lines` has noted: run it again")
    for mutant in every[len(results) : args.mutants]:
        chosen: list[str] = []
        seconds = 0.0
        for name in reached.tests(mutant):
            if chosen and seconds + reached.seconds[name] > args.seconds:
                break
            chosen.append(name)
            seconds += reached.seconds[name]
        row = dict(mutant._asdict(), outcome=outcome(mutant, chosen, seconds), tests=len(chosen))
        del row["code"]
        results.append(row)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{row['outcome']:9} {mutant.file}:{mutant.line}  {mutant.before}  ->  {mutant.after}", flush=True)
    counts = {kind: sum(row["outcome"] == kind for row in results) for kind in ("noticed", "survived", "unreached")}
    print(", ".join(f"{number} {kind}" for kind, number in counts.items()))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("lines", help="which test runs which line")
    one.add_argument("tests", nargs="*", default=["tests"], help="folders of tests")
    one.set_defaults(function=lines)
    two = commands.add_parser("run", help="mutants against the tests of their lines")
    two.add_argument("files", nargs="+", help="files or folders of the package")
    two.add_argument("--mutants", type=int, default=100)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--seconds", type=float, default=90.0, help="of tests a mutant, as measured by lines")
    two.add_argument("--out", default=str(WORK / "mutants.json"))
    two.set_defaults(function=run)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
