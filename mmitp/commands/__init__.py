"""The console command ``mmitp``: every module of this package is a subcommand, found by its name.

``mmitp prune-report`` runs :mod:`mmitp.commands.prune_report`. Such a module has a docstring, whose first line stands
in ``mmitp --help``, and a ``main(argv)`` under :func:`mmitp.engine.cli.command`. It imports what is heavy after the
command line has been read, so that ``--help`` is quick. The files in ``tools/`` run the same functions from a checkout.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import mmitp

__all__ = ["main", "names"]


def names() -> dict[str, str]:
    """Subcommands and the modules they are in, in alphabetical order."""
    modules = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return {module.replace("_", "-"): f"{__name__}.{module}" for module in modules}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mmitp NAME ARGUMENTS``; ``argv`` is without the program's own name, by default ``sys.argv[1:]``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    known = names()
    if argv and argv[0] in known:
        return importlib.import_module(known[argv[0]]).main(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(_usage(known))
        return 0
    if argv and argv[0] == "--version":
        print(f"mmitp {mmitp.__version__}")
        return 0
    if argv:
        near = difflib.get_close_matches(argv[0], known, 1)
        print(f"mmitp: no command {argv[0]!r}" + (f"; the nearest is {near[0]}" if near else ""), file=sys.stderr)
    print(_usage(known), file=sys.stderr)
    return 2


def _usage(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = ["usage: mmitp COMMAND [ARGUMENTS]    (mmitp COMMAND --help; mmitp --version)", ""]
    for name, module in known.items():
        summary = (importlib.import_module(module).__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:<{width}}  {summary}")
    return "\n".join(lines)
