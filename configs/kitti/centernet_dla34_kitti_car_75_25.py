# CenterNet-DLA34 on KITTI as in S1: cars only, a seeded 75/25 split of the labelled frames, dense.
_base_ = [
    "../_base_/models/centernet_dla34.py",
    "../_base_/datasets/kitti_car_75_25.py",
    "../_base_/schedules/centernet_250e.py",
    "../_base_/default_runtime_det.py",
]

model = dict(bbox_head=dict(num_classes=1))
