# ResNet-50 on ImageNet, trained by FastAT and pruned in the same run to at most 0.3 of its operations (b = 10).
_base_ = ["./resnet50_imagenet_psi30.py", "../_base_/attacks/fastat_imagenet.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]
