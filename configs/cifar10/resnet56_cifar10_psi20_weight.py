# ResNet-56 on CIFAR-10, irregular pruning: one mask per weight. The operations are the multiplications by weights that
# are not masked to zero. No b is published for this row, and those of the others cannot be carried over: a weight's
# share of the operations, and so its push, is hundreds of times smaller than a channel's.
_base_ = ["./resnet56_cifar10.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier", prune=dict(granularity="weight"))
custom_hooks = [dict(type="mmitp.PruneHook", target=0.2, b="auto", begin=20, end=240, lr=0.01, interval="iter")]
