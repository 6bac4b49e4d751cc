# CenterNet-DLA34 at a quarter of its width, with plain 3x3 convolutions in the neck: 1,196,611 parameters (3 classes).
_base_ = ["./centernet_dla34_plain.py"]

model = dict(
    backbone=dict(width=0.25),
    neck=dict(in_channels=(16, 32, 64, 128)),
    bbox_head=dict(in_channels=16, feat_channels=64),
)
