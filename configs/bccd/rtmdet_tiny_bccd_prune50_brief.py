# As rtmdet_tiny_bccd_prune50.py, but masks train for two epochs only, the second and the third (204 steps). The small
# network trains longer for it: 27 epochs take the processor time of the dense config's 22.
_base_ = ["./rtmdet_tiny_bccd_prune50.py"]

max_epochs = 27
train_cfg = dict(max_epochs=max_epochs)
warm_up, cosine = _base_.param_scheduler
cosine.update(begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2)
param_scheduler = [warm_up, cosine]
ema, switch, prune = _base_.custom_hooks
switch.switch_epoch = max_epochs * 9 // 10
prune.update(begin=1, end=3)
custom_hooks = [ema, switch, prune]
