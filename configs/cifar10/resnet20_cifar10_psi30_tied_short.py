# ResNet-20 on CIFAR-10, at most 0.3 of the operations, in the time of the CPU-sized schedule's 10 epochs:
# one mask value a channel of the residual stream, for all its readers in all three stages, so that the slimmed network
# is a narrower ResNet-20 without a gather. Masks train in the second epoch under b = "auto" (without decay), then
# the small network, in multiples of 8 channels, takes the masked one's place. 17 epochs fit
# (benchmarks/cifar_sweep/costs.json).
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(
    type="mmitp.MaskedModel",
    of="mmpretrain.ImageClassifier",
    prune=dict(share="stream", linear=True, shape=(32, 32)),
)
custom_hooks = [
    dict(type="mmitp.PruneHook", target=0.3, b="auto", begin=1, end=2, divisor=8, slim_at_end=True),
]
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True, custom_keys={"prune_mask": dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=17, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=5.1, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=5.1, end=17, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=17)
