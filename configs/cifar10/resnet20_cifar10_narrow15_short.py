# Control: a ResNet-20 whose structure is drawn before the first step, 0.1468 of the operations in uniform widths: the
# widths nearest to 0.15 from below that are one share of 16, 32 and 64 rounded up or down (narrow_widths in
# benchmarks/sweep.py). 22 epochs take the time of the dense network's 10: a step costs 0.44 of a dense one
# (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(backbone=dict(base_channels=(6, 12, 25)), head=dict(in_channels=25))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=22, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=6.6, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=6.6, end=22, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=22)
