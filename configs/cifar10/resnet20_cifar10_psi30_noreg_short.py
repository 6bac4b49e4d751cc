# Mask ablation (Fig. 1 of S1), CPU-sized schedule: no weight decay on the masks, masks start at 1.0.
_base_ = ["./resnet20_cifar10_psi30_short.py"]

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
