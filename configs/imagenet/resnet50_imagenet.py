# ResNet-50 on ImageNet, dense:
# mmpretrain's own config, which has S1's schedule (100 epochs, lr 0.1, x0.1 every 30, batch 256).
_base_ = ["mmpretrain::resnet/resnet50_8xb32_in1k.py"]

custom_imports = dict(imports=["mmitp"], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
