# The main job on generated scenes: centernet_scenes.py, pruned on the way to at most half of the operations.
# `make demo` trains both side by side.
_base_ = ["./centernet_scenes.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.CenterNet")
custom_hooks = [
    dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=1, end=5, lr=1e-4, fill=True, input_shape=(128, 384)),
]
