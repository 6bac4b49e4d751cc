"""``mmitp prune-report`` from a checkout."""

import sys

from mmitp.commands.prune_report import main

if __name__ == "__main__":
    sys.exit(main())
