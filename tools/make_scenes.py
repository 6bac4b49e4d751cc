"""``mmitp make-scenes`` from a checkout."""

import sys

from mmitp.commands.make_scenes import main

if __name__ == "__main__":
    sys.exit(main())
