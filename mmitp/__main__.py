"""``python -m mmitp SCRIPT ARGUMENTS``: run a script, say mmdet's tools/train.py, with the stack mended from line one.

``python -m mmitp COMMAND ARGUMENTS`` is the console command ``mmitp COMMAND ARGUMENTS``. Under torchrun:
``torchrun --nproc-per-node 2 -m mmitp train CONFIG --launcher pytorch``.
"""

import runpy
import sys
from pathlib import Path

from mmitp import commands


def main() -> int:
    if len(sys.argv) > 1 and (sys.argv[1] in commands.names() or sys.argv[1] in ("-h", "--help", "--version")):
        return commands.main()
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        if len(sys.argv) > 1:
            print(f"no file and no command {sys.argv[1]!r}", file=sys.stderr)
        names = " ".join(commands.names())
        print(f"usage: python -m mmitp SCRIPT [ARGUMENTS], or a command for SCRIPT: {names}", file=sys.stderr)
        return 2
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
