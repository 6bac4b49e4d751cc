# A CPU-sized schedule (ours): 10 epochs of 391 iterations, one cycle to lr 0.2.
#
# How it is scaled from the 300-epoch schedule, so that the forces on a mask keep their proportions:
# - Decay. Weight decay shrinks a mask by exp(-sum(lr) * decay / (1 - momentum)). The long schedule sums
#   196 * 80 * (0.1 + 0.01 + 0.001) + 196 * 60 * 0.0001 = 1742, with decay 1e-4: exp(-1.74). One cycle has half
#   its peak on average, so it sums 3910 * 0.1 = 391, and decay 5e-4 gives exp(-1.96).
# - Window (in the pruned configs). 1/15 and 4/5 of the run, as 20 and 240 of 300: epochs 1 to 8 of 10.
# - Optimizer 2 (in the pruned configs). Its learning rate times the iterations of the window is kept:
#   0.01 * 220 * 196 = 431 = 0.16 * 7 * 391.
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=5e-4))
param_scheduler = dict(type="OneCycleLR", eta_max=0.2, total_steps=10, by_epoch=True, convert_to_iter_based=True)

train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
test_cfg = dict()
