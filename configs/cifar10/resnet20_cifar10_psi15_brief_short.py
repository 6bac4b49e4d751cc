# As resnet20_cifar10_psi30_brief_short.py, at most 0.15 of the operations, in multiples of 2, 4 and 8 of the layers'
# 16, 32 and 64 channels: multiples of 8 would leave every block an inner width of 8. 22 epochs fit
# (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_psi30_brief_short.py"]

custom_hooks = [dict(_base_.custom_hooks[0], target=0.15, divisor="auto", begin=0.25 / 22, end=0.75 / 22)]
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=22, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=6.6, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=6.6, end=22, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=22)
