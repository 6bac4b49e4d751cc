# CenterNet-DLA34 with plain 3x3 convolutions in the neck.
_base_ = ["./centernet_dla34.py"]

model = dict(neck=dict(use_dcn=False))
