# ResNet-20 on CIFAR-10, at most 0.5 of the operations, in the time of the CPU-sized schedule's 10 epochs: the masks
# train under the closed loop (without decay) from epoch 1 to 4, then the small network, in multiples of 8 channels,
# takes the masked one's place. Its steps cost about 0.74 of the dense ones (benchmarks/README.md), so that
# 12 epochs fit: 4 + 8 * 0.74 = 9.9.
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [
    dict(
        type="mmitp.PruneHook",
        target=0.5,
        b="auto",
        begin=1,
        end=4,
        lr=0.16,
        interval="iter",
        divisor=8,
        slim_at_end=True,
    )
]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
param_scheduler = dict(total_steps=12)
train_cfg = dict(max_epochs=12)
