# As centernet_dla34x025_scenes_kitti_size.py: the start of the narrow control, whose weights have other shapes.
_base_ = ["./centernet_dla34x025_scenes_kitti_size.py"]

model = dict(
    backbone=dict(width=1.0, channels=(3, 6, 11, 22, 44, 89)),
    neck=dict(in_channels=(11, 22, 44, 89)),
    bbox_head=dict(in_channels=11, feat_channels=44),
)
