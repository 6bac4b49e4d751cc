# Control: a ResNet-20 whose structure is drawn before the first step, 0.4957 of the operations in uniform widths: the
# widths nearest to 0.50 from below that are one share of 16, 32 and 64 rounded up or down (narrow_widths in
# benchmarks/sweep.py). 12 epochs were to take the time of the dense network's 10; by later measurements a step
# costs 0.77 of a dense one (benchmarks/cifar_sweep/costs.json), and they take 0.92 of it.
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(backbone=dict(base_channels=(11, 23, 45)), head=dict(in_channels=45))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=12, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3.6, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3.6, end=12, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=12)
