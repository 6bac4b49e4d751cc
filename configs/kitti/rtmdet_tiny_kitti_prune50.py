# RTMDet-tiny on KITTI, pruned on the way to at most half of the operations. AdamW's decay spares the masks: b="auto"
# alone decides how they sink.
_base_ = ["./rtmdet_tiny_kitti.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.RTMDet")
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(prune_mask=dict(decay_mult=0.0))))
pruning = dict(
    type="mmitp.PruneHook",
    target=0.5,
    b="auto",
    begin=1 / 15,
    end=1 / 3,
    lr=1e-4,
    divisor="auto",
    slim_at_end=True,
    input_shape=(192, 640),
)
custom_hooks = [*_base_.custom_hooks, pruning]
