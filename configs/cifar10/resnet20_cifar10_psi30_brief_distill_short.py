# The default at 0.3 with self-distillation: from the second epoch on the small network also learns from the average of
# its own weights over about half an epoch (one more forward pass a step). 15 epochs fit in the time of the CPU-sized
# schedule's 10 (benchmarks/cifar_sweep/costs.json). What is validated and saved is the average, as with any EMAHook.
_base_ = ["./resnet20_cifar10_psi30_brief_short.py"]

custom_hooks = [
    dict(_base_.custom_hooks[0], begin=0.25 / 15, end=0.75 / 15),
    dict(type="EMAHook", momentum=0.005),
    dict(type="mmitp.DistillHook", teacher="ema", begin=1),
]
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=15, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=4.5, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=4.5, end=15, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=15)
