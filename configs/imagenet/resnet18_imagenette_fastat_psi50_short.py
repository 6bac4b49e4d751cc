# ResNet-18 on Imagenette at 64x64, trained by FastAT and pruned in the same run to at most 0.5 of its operations,
# CPU-sized schedule.
_base_ = ["./resnet18_imagenette_psi50_short.py", "../_base_/attacks/fastat_imagenet.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]
