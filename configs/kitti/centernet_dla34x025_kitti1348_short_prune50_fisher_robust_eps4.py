# As centernet_dla34x025_kitti1348_short_prune50_fisher_robust.py, with training images attacked twice as strongly as
# the tests that it is meant for: eps 4/255 and alpha 5/255.
_base_ = ["./centernet_dla34x025_kitti1348_short_prune50_fisher_robust.py"]

prune, attack, guard = _base_.custom_hooks
custom_hooks = [prune, dict(attack, eps=4, alpha=5), guard]
del prune, attack, guard
