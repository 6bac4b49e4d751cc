# As rtmdet_tiny_kitti1348_short_prune50.py, but masks go by the loss that a multiply-accumulate of theirs holds, over
# the whole network: for runs that start from trained weights. What is left takes longer a step, hence 44 epochs.
_base_ = ["./rtmdet_tiny_kitti1348_short_prune50.py"]

max_epochs = 44
train_cfg = dict(max_epochs=max_epochs)
warm_up, cosine = _base_.param_scheduler
cosine.update(begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2)
param_scheduler = [warm_up, cosine]
ema, switch, prune = _base_.custom_hooks
switch.switch_epoch = max_epochs * 9 // 10
prune.push = "fisher"
custom_hooks = [ema, switch, prune]
