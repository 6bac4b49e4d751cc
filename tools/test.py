"""``mmitp test`` from a checkout."""

import sys

from mmitp.commands.test import main

if __name__ == "__main__":
    sys.exit(main())
