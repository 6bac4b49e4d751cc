# ResNet-20 on CIFAR-10, at most 0.15 of the operations, the recommended recipe in the time of the CPU-sized schedule's
# 10 epochs: masks train in the first epoch under the closed loop (without decay), then the small network, in multiples
# of 4 channels, takes the masked one's place. 15 epochs fit: the masked step costs 1.05, the small network's 0.63 of a
# dense one (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [
    dict(type="mmitp.PruneHook", target=0.15, b="auto", begin=0, end=1, divisor=4, slim_at_end=True),
]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=15, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=4.5, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=4.5, end=15, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=15)
