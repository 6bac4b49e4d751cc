# A CPU-sized schedule (ours): 10 epochs of 391 iterations, one cycle to lr 0.2 with the momentum cycled the other way
# (0.95, 0.85 at the peak, 0.95), as torch's OneCycleLR does; mmengine's leaves the momentum alone.
#
# How it is scaled from the 300-epoch schedule, so that the forces on a mask keep their proportions:
# - Decay. Weight decay shrinks a mask by exp(-decay * sum(lr / (1 - momentum))). The long schedule sums
#   196 * (80 * (0.1 + 0.01 + 0.001) + 60 * 0.0001) / 0.1 = 17,417, with decay 1e-4: exp(-1.74). This cycle sums 3,373,
#   and decay 5e-4 gives exp(-1.69).
# - Window (in the pruned configs). 1/15 and 4/5 of the run, as 20 and 240 of 300: epochs 1 to 8 of 10.
# - Optimizer 2 (in the pruned configs). Its learning rate times the iterations of the window is kept:
#   0.01 * 220 * 196 = 431 = 0.16 * 7 * 391.
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.95, weight_decay=5e-4))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.2, total_steps=10, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.85, end=3, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingMomentum", eta_min=0.95, begin=3, end=10, by_epoch=True, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
test_cfg = dict()
