# ResNet-20 on CIFAR-10, at most 0.3 of the operations by the early-freeze recipe in the paper's 300 epochs: masks train
# from epoch 20 to 100 under b = "auto" (without decay), then the small network takes the masked one's place. Masks
# are tied over the residual stream, and layers keep multiples of 8: the small network is a narrower ResNet-20.
_base_ = ["./resnet20_cifar10.py", "../_base_/pruning/early.py"]

model = dict(
    type="mmitp.MaskedModel",
    of="mmpretrain.ImageClassifier",
    prune=dict(share="stream", linear=True, shape=(32, 32)),
)
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True, custom_keys={"prune_mask": dict(decay_mult=0.0)}))
custom_hooks = [dict(_base_.custom_hooks[0], target=0.3, divisor=8)]
