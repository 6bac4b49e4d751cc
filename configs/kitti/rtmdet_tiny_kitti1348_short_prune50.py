# As rtmdet_tiny_kitti1348_short.py, pruned to at most half of the operations in a window of two epochs, the second and
# the third, and slimmed then. 48 epochs take the processor time of the dense network's 36 (metrics/costs.json).
_base_ = ["./rtmdet_tiny_kitti1348_short.py", "../_base_/pruning/early_hook.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.RTMDet")
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(prune_mask=dict(decay_mult=0.0))))
prune = _base_.early
prune.update(begin=1, end=3, lr=1e-4, input_shape=(160, 512))

max_epochs = 48
train_cfg = dict(max_epochs=max_epochs)
warm_up, cosine = _base_.param_scheduler
cosine.update(begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2)
param_scheduler = [warm_up, cosine]
switch = _base_.switch
switch.switch_epoch = max_epochs * 9 // 10
custom_hooks = [_base_.ema, switch, prune]
