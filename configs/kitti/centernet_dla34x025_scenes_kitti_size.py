# The common start of the short runs where random weights do not get far in an hour: the same dense network on generated
# scenes of KITTI's size, 9,000 steps in some 30 to 55 minutes of one core. README.md says how to make the scenes and
# how the other configs take the checkpoint.
_base_ = ["./centernet_dla34x025_kitti1348_short.py"]

data_root = "data/scenes_kitti/"

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(data_root=data_root)
test_evaluator = val_evaluator

# 1,500 of the 2,000 frames are for training: 750 steps an epoch.
train_cfg = dict(max_epochs=12, val_interval=12)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=12)]
