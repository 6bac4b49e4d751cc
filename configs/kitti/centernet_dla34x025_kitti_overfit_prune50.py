# As centernet_dla34x025_kitti_overfit.py, pruned on the way to at most half of the operations. The window keeps S1's
# proportions.
_base_ = ["./centernet_dla34x025_kitti_overfit.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.CenterNet")
custom_hooks = [
    dict(
        type="mmitp.PruneHook",
        target=0.5,
        b="auto",
        begin=4,
        end=48,
        lr=1e-4,
        fill=True,
        input_shape=(192, 640),
    ),
]
