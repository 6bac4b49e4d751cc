# ResNet-20 on CIFAR-10, at most 0.5 of the operations, CPU-sized schedule, masks under b = "auto" instead of a
# fixed b: the push follows a smooth path and is balanced over the layers, and no decay pulls at the masks.
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=1, end=8, lr=0.16, interval="iter")]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
