# A CPU-sized schedule for KITTI-1348 (ours): 48 epochs of 325 steps of 2 images, Adam at 1e-3 with a warm-up, then a
# half cosine. Steps, not epochs, are short: batches are as small as BatchNorm stands. Adam without weight decay: the
# masks of pruned configs are not decayed either.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=48, val_interval=16)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3, weight_decay=0.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=300),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=48, eta_min=1e-5, convert_to_iter_based=True),
]
