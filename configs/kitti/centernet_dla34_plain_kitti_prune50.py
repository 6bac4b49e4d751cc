# As centernet_dla34_kitti_prune50.py with plain 3x3 convolutions in the neck instead of deformable ones.
_base_ = ["./centernet_dla34_kitti_prune50.py"]

model = dict(neck=dict(use_dcn=False))
