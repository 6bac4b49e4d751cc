"""``mmitp profile`` from a checkout."""

import sys

from mmitp.commands.profile import main

if __name__ == "__main__":
    sys.exit(main())
