# ResNet-18 on ImageNet, dense, trained by FastAT.
_base_ = ["./resnet18_imagenet.py", "../_base_/attacks/fastat_imagenet.py"]

custom_hooks = _base_.fastat
