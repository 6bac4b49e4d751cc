# CenterNet-DLA34 on KITTI, trained by FastAT and pruned in the same run to at most half of the whole model's MACs.
_base_ = ["./centernet_dla34_kitti_prune50.py", "../_base_/attacks/fastat_kitti.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]
