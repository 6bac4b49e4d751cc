# CenterNet-DLA34 on KITTI as in S1 (section S.3): cars only, 75/25 split, at most half of the whole model's MACs.
_base_ = ["./centernet_dla34_kitti_car_75_25.py", "../_base_/pruning/centernet_prune50.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.CenterNet")
