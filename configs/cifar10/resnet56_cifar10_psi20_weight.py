# ResNet-56 on CIFAR-10, irregular pruning: one mask per weight. The operations are the multiplications by weights that
# are not masked to zero.
_base_ = ["./resnet56_cifar10.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier", prune=dict(granularity="weight"))
custom_hooks = [dict(type="mmitp.PruneHook", target=0.2, b=50, begin=20, end=240, lr=0.01, interval="iter")]
