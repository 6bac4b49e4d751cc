# As centernet_dla34x025_kitti1348_short.py, pruned on the way to at most half of the operations, in as much processor
# time: the masks freeze at a third of the run and are cut out, so that the rest trains the small network. A step costs
# 1.1 of a dense one before and in the window and 0.88 after it: 51 epochs in the time of 48.
_base_ = ["./centernet_dla34x025_kitti1348_short.py", "../_base_/pruning/early.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.CenterNet")
prune = _base_.custom_hooks[0]
prune.lr = 1e-4
prune.input_shape = (160, 512)
custom_hooks = [prune]
del prune

max_epochs = 51
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=max_epochs)]
