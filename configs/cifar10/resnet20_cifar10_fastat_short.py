# ResNet-20 on CIFAR-10, dense, trained by FastAT, CPU-sized schedule (5 epochs).
_base_ = [
    "../_base_/models/resnet20_cifar.py",
    "../_base_/datasets/cifar10.py",
    "../_base_/schedules/cifar10_robust_short.py",
    "../_base_/attacks/fastat_cifar10.py",
    "../_base_/default_runtime_cls.py",
]

train_dataloader = dict(batch_size=128)
custom_hooks = _base_.fastat
