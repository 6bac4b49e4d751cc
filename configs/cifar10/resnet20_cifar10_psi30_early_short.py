# ResNet-20 on CIFAR-10, at most 0.3 of the operations, the early-freeze recipe in the time of the CPU-sized schedule's
# 10 epochs: masks train in the first epoch under b = "auto" (without decay), then the small network, in multiples
# of 8 channels, takes the masked one's place. 13 epochs fit: the masked step costs 1.04, the small network's 0.76 of a
# dense one (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [
    dict(type="mmitp.PruneHook", target=0.3, b="auto", begin=0, end=1, divisor=8, slim_at_end=True),
]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=13, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3.9, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3.9, end=13, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=13)
