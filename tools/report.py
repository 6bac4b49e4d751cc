"""``mmitp report`` from a checkout."""

import sys

from mmitp.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
