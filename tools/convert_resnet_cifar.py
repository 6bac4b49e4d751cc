"""``mmitp convert-resnet-cifar`` from a checkout."""

import sys

from mmitp.commands.convert_resnet_cifar import main

if __name__ == "__main__":
    sys.exit(main())
