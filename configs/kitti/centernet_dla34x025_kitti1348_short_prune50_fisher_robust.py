# As centernet_dla34x025_kitti1348_short_prune50_fisher.py, trained by FastAT besides: an attacked step costs about two,
# hence 28 epochs.
_base_ = ["./centernet_dla34x025_kitti1348_short_prune50_fisher.py", "../_base_/attacks/fastat_kitti.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]

max_epochs = 28
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=max_epochs)]
