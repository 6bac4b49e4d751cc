# A CPU-sized schedule for the ImageNet family (ours): 10 epochs of 148 iterations of 64 images, one cycle to lr 0.1.
#
# How it is scaled from the 100-epoch schedule:
# - Window (in the pruned config): 7 and 80 of 100, so epochs 1 to 8 of 10.
# - Decay on masks, sum(lr) * decay / (1 - momentum): 100 epochs of 5005 iterations sum
#   5005 * (30 * 0.111 + 10 * 0.0001) = 16,672, and decay 1e-4 shrinks a mask the task leaves alone by exp(-16.7).
#   One cycle sums only 1480 * 0.05 = 74; decay 1e-3 gives exp(-0.74), and more would harm the weights.
# - Optimizer 2 (in the pruned config) therefore has to do most of the work in 1,036 iterations instead of 365,365:
#   b = 'auto' finds the push that arrives in time.
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-3))
param_scheduler = dict(type="OneCycleLR", eta_max=0.1, total_steps=10, by_epoch=True, convert_to_iter_based=True)

train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
test_cfg = dict()
