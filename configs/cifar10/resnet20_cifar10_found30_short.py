# Control: the stage widths that the default finds at 0.3 with seed 0 (resnet20_cifar10_psi30_brief_short.py), built
# before the first step and trained for the same time: what is left between the two is what the search costs or gives.
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(backbone=dict(base_channels=(8, 16, 40)), head=dict(in_channels=40))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=19, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=5.7, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=5.7, end=19, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=19)
