# As resnet20_cifar10_psi30_early_short.py, with a longer search and finer steps: masks train from epoch 1 to 3, after
# the loss has left its first fall, and layers keep multiples of 2, 4 and 8 of their 16, 32 and 64 channels. 12 epochs
# fit (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_psi30_early_short.py"]

custom_hooks = [dict(_base_.custom_hooks[0], begin=1, end=3, divisor="auto")]
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=12, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3.6, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3.6, end=12, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=12)
