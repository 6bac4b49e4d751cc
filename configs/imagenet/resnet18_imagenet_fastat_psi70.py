# ResNet-18 on ImageNet, trained by FastAT and pruned in the same run to at most 0.7 of its operations (b = 10).
_base_ = ["./resnet18_imagenet_psi70.py", "../_base_/attacks/fastat_imagenet.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]
