# As centernet_dla34x025_kitti_overfit.py, trained by FastAT.
_base_ = ["./centernet_dla34x025_kitti_overfit.py", "../_base_/attacks/fastat_kitti.py"]

custom_hooks = _base_.fastat
