# RTMDet-tiny on KITTI-1348 (README.md) at 512x160, dense, for one core: batches of 4, 36 epochs of 162 steps. The rest
# as in rtmdet_tiny_kitti.py: augmentation until the last epochs, averaged weights, half of the epochs at the full rate.
_base_ = ["./rtmdet_tiny_kitti.py"]

input_size = (512, 160)  # width, height

load, annotations, colour, flip, prepare, pack = _base_.train_pipeline
train_pipeline = [load, annotations, colour, flip, dict(prepare, size=input_size), pack]
still = dict(type="mmitp.ScaleShiftCrop", size=input_size)
train_pipeline_stage2 = [load, annotations, flip, still, pack]
test_pipeline = [load, still, annotations, pack]
del load, annotations, colour, flip, prepare, pack, still
# Loading in the training's own process, so that its processor time is the whole run's.
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs, val_interval=12)
warm_up, cosine = _base_.param_scheduler
cosine.update(begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2)
param_scheduler = [warm_up, cosine]
switch = _base_.switch
switch.switch_epoch = max_epochs * 9 // 10
switch.switch_pipeline = train_pipeline_stage2
custom_hooks = [_base_.ema, switch]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
