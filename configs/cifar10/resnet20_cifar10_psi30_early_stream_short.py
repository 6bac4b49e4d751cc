# ResNet-20 on CIFAR-10, at most 0.3 of the operations, the early-freeze recipe in the time of the CPU-sized schedule's
# 10 epochs: masks, one for all readers of a stream, train in the first epoch under b = "auto" (without decay),
# then the small network, in multiples of 8 channels, takes the masked one's place. 12 epochs fit: the masked step
# costs 1.06, the small network's 0.79 of a dense one (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_psi30_early_short.py"]

model = dict(prune=dict(share="stream", linear=True, shape=(32, 32)))
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=12, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3.6, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3.6, end=12, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=12)
