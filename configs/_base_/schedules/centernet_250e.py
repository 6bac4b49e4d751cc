# S1 (section S.3): Adam, 250 epochs, steps at 60, 90 and 120. S1 words the step as "decrease by 0.01"; read as times
# 0.1. The learning rate is CenterNet's own on KITTI, 1.25e-4 at a batch of 16.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=250, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1.25e-4, weight_decay=0.0))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, begin=0, end=250, milestones=[60, 90, 120], gamma=0.1)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
