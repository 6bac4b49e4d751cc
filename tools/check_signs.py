"""``mmitp check-signs`` from a checkout."""

import sys

from mmitp.commands.check_signs import main

if __name__ == "__main__":
    sys.exit(main())
