"""``python -m mmitp SCRIPT ARGUMENTS``: run a script, say mmdet's tools/train.py, with the stack mended from line one.

Under torchrun: ``torchrun --nproc-per-node 2 -m mmitp SCRIPT ARGUMENTS``.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(
            "usage: python -m mmitp SCRIPT [ARGUMENTS]" + (f": no file {sys.argv[1]}" if len(sys.argv) > 1 else "")
        )
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
