# ResNet-20 on CIFAR-10 through mmpretrain's own pipeline, CPU-sized schedule: the twin of resnet20_cifar10_short.py.
_base_ = [
    "../_base_/models/resnet20_cifar.py",
    "../_base_/datasets/cifar10_stock.py",
    "../_base_/schedules/cifar10_short.py",
    "../_base_/default_runtime_cls.py",
]

train_dataloader = dict(batch_size=128)
