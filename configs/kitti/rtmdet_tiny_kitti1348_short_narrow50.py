# Control: rtmdet_tiny_kitti1348_short.py built narrower, all its layers alike (by a factor of 0.71), dense: 790,843,620
# of 1,594,955,520 MACs (0.4958). It is what pruning has to beat. 51 epochs take the processor time of the dense
# network's 36 (metrics/costs.json).
_base_ = ["./rtmdet_tiny_kitti1348_short.py"]

model = dict(
    backbone=dict(widen_factor=68 / 256),
    neck=dict(in_channels=[68, 136, 272], out_channels=67),
    bbox_head=dict(in_channels=67, feat_channels=67),
)

max_epochs = 51
train_cfg = dict(max_epochs=max_epochs)
warm_up, cosine = _base_.param_scheduler
cosine.update(begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2)
param_scheduler = [warm_up, cosine]
switch = _base_.switch
switch.switch_epoch = max_epochs * 9 // 10
custom_hooks = [_base_.ema, switch]
