# ResNet-56 on CIFAR-10, dense.
_base_ = [
    "../_base_/models/resnet56_cifar.py",
    "../_base_/datasets/cifar10.py",
    "../_base_/schedules/cifar10_300e.py",
    "../_base_/default_runtime_cls.py",
]
