"""``mmitp train`` from a checkout."""

import sys

from mmitp.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
