# As centernet_dla34x025_kitti1348_short_prune50.py with a window of two epochs, the second and the third: 57 epochs in
# the time of the dense network's 48.
_base_ = ["./centernet_dla34x025_kitti1348_short_prune50.py"]

custom_hooks = [dict(_base_.custom_hooks[0], begin=1, end=3)]

max_epochs = 57
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=max_epochs)]
