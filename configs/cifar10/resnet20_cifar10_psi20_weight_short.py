# ResNet-20 on CIFAR-10, irregular pruning (one mask per weight), CPU-sized schedule (its base says how it is scaled).
# The operations are the multiplications by weights that are not masked to zero. Why b is 'auto': see
# resnet56_cifar10_psi20_weight.py.
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier", prune=dict(granularity="weight"))
custom_hooks = [dict(type="mmitp.PruneHook", target=0.2, b="auto", begin=1, end=8, lr=0.16, interval="iter")]
