"""The edge of every command: a user's mistake ends in one paragraph and exit status 2, a defect in a traceback.

A ``main`` decorated with :func:`command` may raise ``ValueError`` (or :class:`UserError`, the tools' own) wherever our
code checks something. Files and folders that are missing, protected or full count too, and so does what mmengine says
of a config's ``type`` or arguments when it builds them, a package that is not installed, and an address that cannot be
reached. The options that several commands share are here. Nothing heavy is imported.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import math
import re
import sys
import traceback
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmitp.engine.coco_file import fault

__all__ = [
    "UserError",
    "add_config",
    "add_launcher",
    "add_out",
    "add_trust",
    "command",
    "needs_out",
    "non_negative",
    "parser",
    "positive",
    "raised_by_us",
    "torch_device",
]

_PACKAGE = Path(__file__).resolve().parents[1]
# Where mmengine makes an object of a part of the config.
_BUILDER = ("mmengine", "registry", "build_functions.py")
# What a user may lack, and what brings it.
_PACKAGES = {
    **dict.fromkeys(("numpy", "torch"), "pip install torch numpy"),
    **dict.fromkeys(("mmcv", "mmdet", "mmengine", "mmpretrain", "torchvision"), 'pip install -e ".[mm]"'),
    **dict.fromkeys(("onnx", "onnxruntime"), 'pip install -e ".[export]"'),
}


class UserError(ValueError):
    """What the user asked for cannot be done; the text names the file, key or option and says what to do."""


def parser(doc: str | None, module: str | None = None) -> argparse.ArgumentParser:
    """A parser with a docstring as its help and the option ``--traceback`` of :func:`command`.

    Args:
        doc: the command's docstring.
        module: ``__name__`` of a module of :mod:`mmitp.commands`, whose usage line then reads ``mmitp NAME``.
    """
    prog = None if module is None else f"mmitp {_command_name(module.rpartition('.')[2])}"
    made = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return made


def add_config(options: argparse.ArgumentParser, help: str = "config file, or PACKAGE::NAME of a packaged one") -> None:
    """The argument ``config`` and the option ``--cfg-options``, which becomes a dictionary (mmengine's DictAction)."""
    options.add_argument("config", help=help)
    options.add_argument(
        "--cfg-options",
        nargs="+",
        action=_ConfigOptions,
        default={},
        metavar="KEY=VALUE",
        help="settings to override: a.b=1, a.0.b=x for the first entry of a list, a=[1,2] for lists",
    )


class _ConfigOptions(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from mmitp.engine.config import read_options  # mmengine: heavy, and absent where --help has to work

        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **read_options(values)})


def add_out(
    options: argparse.ArgumentParser, help: str, *former: str, metavar: str = "FILE", positional: bool = False
) -> None:
    """The option ``--out`` of every command that writes: ``args.out``, ``None`` where it is not given.

    Args:
        options: the parser.
        help: what is written.
        former: other names of the option, from before all commands had the same.
        metavar: how the help calls it.
        positional: the path may also stand behind the other arguments, as it had to before.
    """
    options.add_argument("--out", *former, action=_Once, metavar=metavar, help=help)
    if positional:
        options.add_argument("out", nargs="?", action=_Once, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest, None) is not None:
            raise argparse.ArgumentError(self, f"given twice: {getattr(namespace, self.dest)} and {values}")
        setattr(namespace, self.dest, values)


def needs_out(options: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command where ``--out`` is missing."""
    if args.out is None:
        options.error("the following arguments are required: --out")


def add_launcher(options: argparse.ArgumentParser) -> None:
    """``--launcher`` and what torch's launchers append by themselves."""
    options.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    options.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_trust(options: argparse.ArgumentParser) -> None:
    """The option ``--trust`` of tools that read checkpoints; without it they are data, whoever wrote them."""
    options.add_argument(
        "--trust", action="store_true", help="also load checkpoints that can run code: only those of people you trust"
    )


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Decorates a command's ``main(argv)``, which returns an exit status or ``None`` for 0.

    A mistake of the user (see the module) becomes ``name: text`` on stderr and ``SystemExit(2)``; a check of ours that
    failed (``RuntimeError``) the same with ``SystemExit(1)``. ``--traceback`` shows the whole. Anything else is a
    defect and passes.
    """
    file = Path(main.__code__.co_filename).resolve()
    folder = file.parent
    name = f"mmitp {_command_name(file.stem)}" if folder == _PACKAGE / "commands" else file.name

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except Exception as error:
            known = next((e for e in _chain(error) if _explains_itself(e, folder)), None)
            known = known or next((e for e in _chain(error) if _built(e) is not None and not _is_ours(e, folder)), None)
            if known is None:
                raise
            if "--traceback" in (sys.argv[1:] if argv is None else argv):
                traceback.print_exc()
            print(f"{name}: {_text(known)}", file=sys.stderr)
            status = 1 if isinstance(known, RuntimeError) and _is_ours(known, folder) else 2
        raise SystemExit(status)

    return run


def _command_name(module: str) -> str:
    return module.replace("_", "-")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised for or while handling (libraries wrap ours in theirs), outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _explains_itself(error: BaseException, tools: Path) -> bool:
    if _from_worker(error):
        return True
    if isinstance(error, OSError):
        return error.filename is not None or isinstance(error, urllib.error.URLError) or _is_ours(error, tools)
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return True
    return isinstance(error, (ValueError, RuntimeError, ImportError)) and _is_ours(error, tools)


def _is_ours(error: BaseException, tools: Path) -> bool:
    """Whether a statement of this package, or of the tool, raised it."""
    file = _raised_in(error)
    return raised_by_us(error) or file.is_file() and file.resolve().parent == tools


def raised_by_us(error: BaseException) -> bool:
    """Whether a statement of this package raised it, and not one that it calls."""
    return _PACKAGE in _raised_in(error).resolve().parents


@dataclass
class _Part:
    """The part of a config that other people's code did not take, when mmengine built it.

    Attributes:
        kind: its ``type``.
        file: the annotation file that it names, or nothing.
        known: names that would have been taken in place of the wrong one.
        classes: names of the classes that it asks for, if it does.
    """

    kind: str
    file: str
    known: list[str]
    classes: list[str] | None = None


def _built(error: BaseException) -> _Part | None:
    """The innermost part that was being built."""
    built, place = None, error.__traceback__
    while place is not None:
        frame, place = place.tb_frame, place.tb_next
        if Path(frame.f_code.co_filename).parts[-3:] == _BUILDER and isinstance(frame.f_locals.get("args"), dict):
            here = frame.f_locals
            args, made = here["args"], here.get("obj_cls")
            found = here.get("obj_type", args.get("type"))
            kind = found if isinstance(found, str) else getattr(found, "__name__", str(found))
            file = args.get("ann_file") or ""
            file = str(Path(args.get("data_root") or "") / file) if isinstance(file, str) and file else ""
            known = _registered(_root(here.get("registry"))) if made is None else _accepted(made)
            classes = (args.get("metainfo") or {}).get("classes") if isinstance(args.get("metainfo"), dict) else None
            built = _Part(kind, file, known, list(classes) if isinstance(classes, (list, tuple)) else None)
    return built


def _root(registry: Any) -> Any:
    while getattr(registry, "parent", None) is not None:
        registry = registry.parent
    return registry


def _registered(registry: Any) -> list[str]:
    """The names in a registry and in those below it, with their scopes."""
    if registry is None:
        return []
    below = [name for child in registry.children.values() for name in _registered(child)]
    return [f"{registry.scope}.{name}" for name in registry.module_dict] + list(registry.module_dict) + below


def _accepted(made: Any) -> list[str]:
    try:
        return list(inspect.signature(made).parameters)
    except (TypeError, ValueError):
        return []


def _nearest(part: _Part, error: BaseException, text: str) -> str:
    """Which name was probably meant, where one is unknown."""
    wrong = re.search(r"unexpected keyword argument '(\w+)'", text)
    if wrong is None and not isinstance(error, KeyError):
        return ""
    near = difflib.get_close_matches(part.kind if wrong is None else wrong[1], part.known, 1)
    return f" (the nearest name is {near[0]!r})" if near else ""


def _raised_in(error: BaseException) -> Path:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return Path(place.tb_frame.f_code.co_filename if place is not None else "")


def _unreachable(error: urllib.error.URLError) -> str:
    """What was to be fetched, why it was not, and what helps without a network."""
    url, place = None, error.__traceback__
    while place is not None and url is None:
        url, place = place.tb_frame.f_locals.get("url"), place.tb_next  # torch.hub's, and urllib's own
    # torch.hub looks there for the file's name before it asks the network; torch is there if it was at work
    hub = sys.modules.get("torch.hub")
    folder = f"{hub.get_dir()}/checkpoints" if hub is not None else "torch's cache"
    return (
        f"{getattr(url, 'full_url', url)} cannot be fetched ({error.reason}). Weights that a config names by an "
        f"address are downloaded as the run starts. Without a network put the file into {folder}, or leave it out: "
        "--cfg-options model.backbone.init_cfg=None, or load_from=None, whichever names it (docs/faq.md)"
    )


def _text(error: BaseException) -> str:
    if said := _from_worker(error):
        return said
    if isinstance(error, urllib.error.URLError):
        return _unreachable(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return f"{error.name} is not installed, which this command needs: {_PACKAGES[error.name]} (docs/faq.md)"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    built = _built(error)
    if built is None or raised_by_us(error):
        return text
    said = " ".join(text.split())  # other people's may have lines
    said += _nearest(built, error, said)
    of = f" of {built.file}" if built.file else ""
    if built.kind in said:
        return said
    if built.file.endswith(".json") and (why := fault(built.file, built.classes)):
        said = why
    elif "need at least one array to concatenate" in said:  # numpy's, as mmengine joins what is left
        said = (
            "no image is left in it: those without boxes of metainfo.classes are left out where filter_cfg says so "
            "(names have to be equal, capitals too), and those below its min_size"
        )
    else:
        said = f"{type(error).__name__}: {said}"
    return f"the config's {built.kind!r}{of} cannot be built: {said}"


def _from_worker(error: BaseException) -> str:
    """What a data loader's process reported, if a user can mend it: torch raises it anew, as text, with its trace."""
    text = str(error.args[0]) if error.args else ""
    if not re.match(r"Caught \w+ in (DataLoader worker|pin memory)", text):
        return ""
    files = re.findall(r'(?m)^  File "(.+?)", line \d+', text)
    kind, _, said = text.strip().rpartition("\n")[2].partition(": ")
    ours = bool(files) and _PACKAGE in Path(files[-1]).resolve().parents
    if isinstance(error, OSError) or ours and kind in ("ValueError", "RuntimeError", "ImportError"):
        return said
    return ""


def positive(text: str) -> int:
    """Type of an option that takes a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


positive.__name__ = "whole number"  # argparse names the type where int() fails


def non_negative(text: str) -> float:
    """Type of an option that takes a finite number of at least 0."""
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


non_negative.__name__ = "number"


def torch_device(name: str) -> str:
    """A device's name, if this machine and this build of torch have it.

    Raises:
        UserError: they do not.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"there is no device {name!r} here: {reason} (torch {torch.__version__})") from error
    return name
