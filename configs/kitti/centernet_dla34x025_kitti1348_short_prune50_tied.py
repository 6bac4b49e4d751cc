# As centernet_dla34x025_kitti1348_short_prune50_brief.py with masks tied over the streams of DLA: what is left has
# narrower tensors and little to gather. 56 epochs fit into the time of the dense network's 48 (metrics/costs.json).
_base_ = ["./centernet_dla34x025_kitti1348_short_prune50_brief.py"]

model = dict(prune=dict(share="stream"))

max_epochs = 56
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=max_epochs)]
