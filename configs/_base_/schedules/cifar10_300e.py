# The paper's CIFAR-10 schedule (S1): 300 epochs of 196 iterations, lr 0.1, x0.1 every 80. Inferred, not published:
# batch 256 (the curves' iteration axis), momentum 0.9 and weight decay 1e-4, which also acts on the masks (L_reg).
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4))
param_scheduler = dict(type="MultiStepLR", by_epoch=True, milestones=[80, 160, 240], gamma=0.1)

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=5)
val_cfg = dict()
test_cfg = dict()
