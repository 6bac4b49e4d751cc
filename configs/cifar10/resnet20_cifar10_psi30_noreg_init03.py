# Mask ablation (Fig. 1 of S1): no weight decay on the masks, masks start at 0.3.
_base_ = ["./resnet20_cifar10_psi30_noreg.py"]

model = dict(prune=dict(init=0.3))
