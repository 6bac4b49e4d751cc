"""Convert a public CIFAR ResNet checkpoint for mmpretrain.

    mmitp convert-resnet-cifar resnet20.th --out resnet20_cifar10.pth

The source's keys are conv1, bn1, layer1.0.conv1, ..., linear; the key map is documented at
mmitp.models.resnet_cifar.convert_resnet_cifar.
"""

from collections.abc import Sequence

from mmitp.engine.cli import add_out, add_trust, command, needs_out, parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    options.add_argument("source", help="the public checkpoint")
    add_out(options, "the file to write", positional=True)
    add_trust(options)
    args = options.parse_args(argv)
    needs_out(options, args)

    from mmitp.engine.results import check_writable
    from mmitp.models.resnet_cifar import convert_resnet_cifar_file

    check_writable(args.out)
    convert_resnet_cifar_file(args.source, args.out, args.trust)
