# Control: a ResNet-20 of half the widths, 0.25 of the operations, whose structure is drawn before the first step. Its
# channels are multiples of 8, which kernels like. 21 epochs take 0.95 of the time of the dense network's
# 10 (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(backbone=dict(base_channels=(8, 16, 32)), head=dict(in_channels=32))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=21, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=6.3, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=6.3, end=21, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=21)
