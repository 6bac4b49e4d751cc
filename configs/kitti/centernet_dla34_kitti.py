# CenterNet-DLA34 on KITTI, dense: the baseline of the pruned experiments. Three classes, 3DOP split.
_base_ = [
    "../_base_/models/centernet_dla34.py",
    "../_base_/datasets/kitti.py",
    "../_base_/schedules/centernet_250e.py",
    "../_base_/default_runtime_det.py",
]

default_hooks = dict(checkpoint=dict(save_best="kitti/Car_R40_moderate", rule="greater"))
