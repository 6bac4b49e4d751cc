# As resnet20_cifar10_psi30_brief_short.py, at most 0.5 of the operations. 13 epochs fit
# (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_psi30_brief_short.py"]

custom_hooks = [dict(_base_.custom_hooks[0], target=0.5, begin=0.25 / 13, end=0.75 / 13)]
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=13, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3.9, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3.9, end=13, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=13)
