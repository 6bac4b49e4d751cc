"""``mmitp slim`` from a checkout."""

import sys

from mmitp.commands.slim import main

if __name__ == "__main__":
    sys.exit(main())
