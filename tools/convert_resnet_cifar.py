"""Convert a public CIFAR ResNet checkpoint (conv1, bn1, layer1.0.conv1, ..., linear) for mmpretrain.

    python tools/convert_resnet_cifar.py resnet20.th resnet20_cifar10.pth

The key map is documented at mmitp.models.resnet_cifar.convert_resnet_cifar.
"""

import sys
from collections.abc import Sequence

import mmitp  # noqa: F401  (makes the OpenMMLab stack importable without compiled operators)
from mmitp.engine.cli import add_trust, command, parser
from mmitp.engine.results import check_writable
from mmitp.models.resnet_cifar import convert_resnet_cifar_file


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("source", help="the public checkpoint")
    options.add_argument("target", help="the file to write")
    add_trust(options)
    args = options.parse_args(argv)
    check_writable(args.target)
    convert_resnet_cifar_file(args.source, args.target, args.trust)


if __name__ == "__main__":
    sys.exit(main())
