# ResNet-20 on CIFAR-10, at most 0.5 of the operations, the recommended recipe in the time of the CPU-sized schedule's
# 10 epochs: as resnet20_cifar10_psi30_early_auto_short.py. 11 epochs take 1.04 of that time
# (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_psi30_early_auto_short.py"]

custom_hooks = [dict(_base_.custom_hooks[0], target=0.5)]
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=11, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3.3, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3.3, end=11, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=11)
