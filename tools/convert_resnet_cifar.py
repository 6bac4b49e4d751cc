"""Convert a public CIFAR ResNet checkpoint (conv1, bn1, layer1.0.conv1, ..., linear) for mmpretrain.

    python tools/convert_resnet_cifar.py resnet20.th resnet20_cifar10.pth

The key map is documented at mmitp.models.resnet_cifar.convert_resnet_cifar.
"""

import argparse

import mmitp  # noqa: F401  (makes the OpenMMLab stack importable without compiled operators)
from mmitp.models.resnet_cifar import convert_resnet_cifar_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the public checkpoint")
    parser.add_argument("target", help="the file to write")
    args = parser.parse_args()
    convert_resnet_cifar_file(args.source, args.target)


if __name__ == "__main__":
    main()
