# RTMDet-tiny on BCCD, pruned on the way to at most half of the operations by the recommended recipe. As many epochs as
# take the processor time of the dense config's.
_base_ = ["./rtmdet_tiny_bccd.py", "../_base_/pruning/early_hook.py"]

model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
prune = _base_.early
prune.input_shape = (192, 256)  # the operations are stated for
custom_hooks = [*_base_.custom_hooks, prune]
