# Mask ablation (Fig. 1 of S1), CPU-sized schedule: no weight decay on the masks, masks start at 1.0.
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.3, b=10, begin=1, end=8, lr=0.16, min_keep=0, fill=False)]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
