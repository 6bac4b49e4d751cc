"""``mmitp export`` from a checkout."""

import sys

from mmitp.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
