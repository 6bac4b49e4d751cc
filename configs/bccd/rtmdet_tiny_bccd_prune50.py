# RTMDet-tiny on BCCD, pruned on the way to at most half of the operations by the early-freeze recipe. 24 epochs take
# the processor time of the dense config's 22: a whole run of one length costs 0.90 (`benchmarks/whole_run.py
# rtmdet_bccd`).
_base_ = ["./rtmdet_tiny_bccd.py", "../_base_/pruning/early_hook.py"]

model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
prune = _base_.early
prune.input_shape = (192, 256)  # the operations are stated for

max_epochs = 24
train_cfg = dict(max_epochs=max_epochs)
warm_up, cosine = _base_.param_scheduler
cosine.update(begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2)
param_scheduler = [warm_up, cosine]
switch = _base_.switch
switch.switch_epoch = max_epochs * 9 // 10
custom_hooks = [_base_.ema, switch, prune]
