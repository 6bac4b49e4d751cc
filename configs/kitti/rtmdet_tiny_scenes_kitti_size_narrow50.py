# The start of the narrow control, rtmdet_tiny_kitti1348_short_narrow50.py, as rtmdet_tiny_scenes_kitti_size.py.
_base_ = ["./rtmdet_tiny_scenes_kitti_size.py"]

model = dict(
    backbone=dict(widen_factor=68 / 256),
    neck=dict(in_channels=[68, 136, 272], out_channels=67),
    bbox_head=dict(in_channels=67, feat_channels=67),
)
