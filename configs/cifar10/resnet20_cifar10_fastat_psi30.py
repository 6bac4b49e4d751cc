# ResNet-20 on CIFAR-10, trained by FastAT and pruned in the same run to at most 0.3 of its operations (b = 10).
_base_ = ["./resnet20_cifar10_psi30.py", "../_base_/attacks/fastat_cifar10.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]
