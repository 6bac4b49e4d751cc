# Control: centernet_dla34x025_kitti1348_short.py built narrower, all its layers alike (by a factor of 0.695), dense:
# 316,376,080 of 634,142,720 MACs (0.4989), 574,032 parameters. Its steps cost
# 0.83 of the wider network's (metrics/costs.json), so its 60 epochs are 1.04 of the dense run.
_base_ = ["./centernet_dla34x025_kitti1348_short.py"]

model = dict(
    backbone=dict(width=1.0, channels=(3, 6, 11, 22, 44, 89)),
    neck=dict(in_channels=(11, 22, 44, 89)),
    bbox_head=dict(in_channels=11, feat_channels=44),
)

max_epochs = 60
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=max_epochs)]
