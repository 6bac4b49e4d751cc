# As centernet_dla34x025_kitti1348_short_prune50.py, to at most 0.3 of the operations.
_base_ = ["./centernet_dla34x025_kitti1348_short_prune50.py"]

prune = _base_.custom_hooks[0]
prune.target = 0.3
custom_hooks = [prune]
del prune
