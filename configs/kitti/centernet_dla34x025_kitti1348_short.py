# CenterNet-DLA34 at a quarter of its width on KITTI-1348 (README.md), dense: 50 to 100 minutes
# of one core, 15,600 steps of 0.35 s (two shared cores, busy; less on idle ones) and three validations.
_base_ = [
    "../_base_/models/centernet_dla34x025_plain.py",
    "../_base_/datasets/kitti_512x160.py",
    "../_base_/schedules/kitti1348_short.py",
    "../_base_/default_runtime_det.py",
]

default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
