# ResNet-18 on Imagenette at 64x64, dense, trained by FastAT, CPU-sized schedule.
_base_ = ["./resnet18_imagenette_short.py", "../_base_/attacks/fastat_imagenet.py"]

custom_hooks = _base_.fastat
