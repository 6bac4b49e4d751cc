# A CPU-sized schedule for FastAT (ours): 5 epochs of 391 iterations, one cycle to lr 0.2, FastAT's own peak. An
# attacked epoch costs two plain ones, so it takes as long as cifar10_short.py, whose rules scale it:
# - Decay. One cycle sums 1955 * 0.1 = 196; decay 1e-3 shrinks a mask by exp(-1.96), as there (300 epochs: exp(-1.74)).
# - Window (in the pruned configs). 1/15 and 4/5 of the run are epochs 0.33 and 4; whole epochs, and none before the
#   weights have learnt something: 1 to 4 of 5.
# - Optimizer 2 (in the pruned configs). 0.01 * 220 * 196 = 431 = 0.37 * 3 * 391.
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=1e-3))
param_scheduler = dict(type="OneCycleLR", eta_max=0.2, total_steps=5, by_epoch=True, convert_to_iter_based=True)

train_cfg = dict(by_epoch=True, max_epochs=5, val_interval=1)
val_cfg = dict()
test_cfg = dict()
