# Control: a ResNet-20 whose structure is drawn before the first step, 0.2959 of the operations, narrower early, wider
# late than uniform widths: 0.44, 0.53 and 0.66 of the stages' channels. 18 epochs by the first measurement of its step
# (0.56 of a dense one); by the median of all (benchmarks/cifar_sweep/costs.json) they cost 1.04 of 10 dense ones.
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(backbone=dict(base_channels=(7, 17, 42)), head=dict(in_channels=42))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=18, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=5.4, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=5.4, end=18, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=18)
