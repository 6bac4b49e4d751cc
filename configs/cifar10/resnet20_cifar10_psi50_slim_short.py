# ResNet-20 on CIFAR-10, at most 0.5 of the operations, in the time of the CPU-sized schedule's 10 epochs: the masks
# train under b = "auto" (without decay) from epoch 1 to 4, then the small network, in multiples of 8 channels, takes
# the masked one's place. 12 epochs were to fit; by later measurements its steps cost 0.86 of the dense ones, the run
# 1.10 (benchmarks/cifar_sweep/costs.json). The measured rows are of the closed loop before commit 4739179.
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
        fill=True,
        slim_at_end=True,
    )
]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=12, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3.6, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3.6, end=12, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=12)
