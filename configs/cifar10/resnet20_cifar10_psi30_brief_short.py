# ResNet-20 on CIFAR-10, at most 0.3 of the operations, the default in the time of the CPU-sized schedule's 10 epochs.
# Masks tied over the residual stream, as in resnet20_cifar10_psi30_tied_short.py, train for half an epoch: from a
# quarter of the first one to three quarters of it (195 steps). 18 epochs fit (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_psi30_tied_short.py"]

custom_hooks = [dict(_base_.custom_hooks[0], begin=0.25 / 18, end=0.75 / 18, by_epoch=False)]
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=18, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=5.4, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=5.4, end=18, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=18)
