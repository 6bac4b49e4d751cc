# Control: rtmdet_tiny_bccd.py built narrower, all its layers alike (by a factor of 0.70), dense: 474,545,476 of
# 957,051,648 MACs (0.4958), 2,444,393 parameters. It is what pruning has to beat. Its 30 epochs took 1.06 of the
# processor time of the wider network's 22 (benchmarks/bccd).
_base_ = ["./rtmdet_tiny_bccd.py"]

model = dict(
    backbone=dict(widen_factor=68 / 256),
    neck=dict(in_channels=[68, 136, 272], out_channels=67),
    bbox_head=dict(in_channels=67, feat_channels=67),
)

max_epochs = 30
train_cfg = dict(max_epochs=max_epochs)
warm_up, cosine = _base_.param_scheduler
cosine.update(begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2)
param_scheduler = [warm_up, cosine]
switch = _base_.switch
switch.switch_epoch = max_epochs * 9 // 10
custom_hooks = [_base_.ema, switch]
