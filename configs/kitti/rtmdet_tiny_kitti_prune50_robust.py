# As rtmdet_tiny_kitti_prune50.py, trained by FastAT besides.
_base_ = ["./rtmdet_tiny_kitti_prune50.py", "../_base_/attacks/fastat_kitti.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]
