"""``mmitp eval-kitti`` from a checkout, also from one that is not installed; needs numpy only."""

import sys
from pathlib import Path

try:
    from mmitp.commands.eval_kitti import main
except ModuleNotFoundError as error:
    if error.name != "mmitp":
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mmitp.commands.eval_kitti import main

if __name__ == "__main__":
    sys.exit(main())
