# CenterNet-DLA34 on KITTI, pruned during its training to at most half of the whole model's MACs (S1, section S.3).
_base_ = ["./centernet_kitti.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.CenterNet")

# S1's window of 20 to 240 of 300 epochs in proportion. lr 0.01 with a fixed b = 10 would never move the 12,512 masks of
# this network in 250 epochs; 'auto' pushes as hard as the path to the target needs.
custom_hooks = [
    dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=17, end=200, lr=0.01, input_shape=(384, 1280)),
]
