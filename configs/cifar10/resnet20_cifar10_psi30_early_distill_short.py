# ResNet-20 on CIFAR-10, at most 0.3 of the operations, the recommended recipe with self-distillation: after the window
# the small network also learns from the average of its own weights over about half an epoch (one more forward pass a
# step). 10 epochs fit in the time of the CPU-sized schedule's 10: the masked step costs 1.03 of a dense one, the small
# network's with its teacher 0.98 (benchmarks/cifar_sweep/costs.json). What is validated and saved is the average,
# as with any EMAHook.
_base_ = ["./resnet20_cifar10_psi30_early_auto_short.py"]

custom_hooks = [
    *_base_.custom_hooks,
    dict(type="EMAHook", momentum=0.005),
    dict(type="mmitp.DistillHook", teacher="ema", begin=3),
]
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=10, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3.0, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3.0, end=10, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=10)
