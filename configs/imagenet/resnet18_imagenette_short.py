# ResNet-18 on Imagenette at 64x64, dense, CPU-sized schedule: a trial of the ImageNet configs.
_base_ = [
    "mmpretrain::_base_/models/resnet18.py",
    "../_base_/datasets/imagenette64.py",
    "../_base_/schedules/imagenette_short.py",
    "../_base_/default_runtime_cls.py",
]

model = dict(head=dict(num_classes=10))
