# ResNet-20 on CIFAR-10, dense, trained by FastAT.
_base_ = ["./resnet20_cifar10.py", "../_base_/attacks/fastat_cifar10.py"]

custom_hooks = _base_.fastat
