# CenterNet-DLA34 on KITTI, pruned during its training to at most half of the whole model's MACs (S1, section S.3).
_base_ = ["./centernet_dla34_kitti.py", "../_base_/pruning/centernet_prune50.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.CenterNet")
