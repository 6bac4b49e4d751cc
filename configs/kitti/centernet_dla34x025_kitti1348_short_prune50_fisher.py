# As centernet_dla34x025_kitti1348_short_prune50_brief.py, but masks go by the loss that a multiply-accumulate of theirs
# holds, over the whole network: for runs that start from trained weights, which tell it from the first step on.
_base_ = ["./centernet_dla34x025_kitti1348_short_prune50_brief.py"]

custom_hooks = [dict(_base_.custom_hooks[0], push="fisher")]
