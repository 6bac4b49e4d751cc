# ResNet-56 on CIFAR-10, trained by FastAT and pruned in the same run to at most 0.5 of its operations (b = 10).
_base_ = ["./resnet56_cifar10_psi50.py", "../_base_/attacks/fastat_cifar10.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]
