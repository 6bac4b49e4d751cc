# ResNet-50 on ImageNet, dense, trained by FastAT.
_base_ = ["./resnet50_imagenet.py", "../_base_/attacks/fastat_imagenet.py"]

custom_hooks = _base_.fastat
