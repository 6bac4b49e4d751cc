# As centernet_dla34x025_kitti_overfit_prune50.py, trained by FastAT besides.
_base_ = ["./centernet_dla34x025_kitti_overfit_prune50.py", "../_base_/attacks/fastat_kitti.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]
