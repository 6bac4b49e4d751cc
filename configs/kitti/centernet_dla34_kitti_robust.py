# CenterNet-DLA34 on KITTI, dense, trained by FastAT.
_base_ = ["./centernet_dla34_kitti.py", "../_base_/attacks/fastat_kitti.py"]

custom_hooks = _base_.fastat
