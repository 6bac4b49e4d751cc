# ResNet-20 on CIFAR-10, at most 0.15 of the operations, the recommended recipe in the time of the CPU-sized schedule's
# 10 epochs: masks train in the first epoch under the closed loop (without decay), then the small network, in multiples
# of 4 channels, takes the masked one's place. 15 epochs fit: the masked step costs 1.05, the small network's 0.63 of a
# dense one (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_psi30_early_short.py"]

custom_hooks = [dict(_base_.custom_hooks[0], target=0.15, divisor=4)]
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=15, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=4.5, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=4.5, end=15, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=15)
