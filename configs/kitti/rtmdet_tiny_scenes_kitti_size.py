# RTMDet-tiny's start for KITTI-1348: the dense network on generated scenes of KITTI's size (README.md), 4,500 steps of
# 4 images.
_base_ = ["./rtmdet_tiny_kitti1348_short.py"]

data_root = "data/scenes_kitti/"

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(data_root=data_root)
test_evaluator = val_evaluator

# 1,500 of the 2,000 frames are for training: 375 steps an epoch.
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
warm_up, cosine = _base_.param_scheduler
cosine.update(begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2)
param_scheduler = [warm_up, cosine]
switch = _base_.switch
switch.switch_epoch = max_epochs - 1
custom_hooks = [_base_.ema, switch]
