# ResNet-56 on CIFAR-10, pruned in training to at most 0.2 of its operations (b = 10).
_base_ = ["./resnet56_cifar10.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.2, b=10, begin=20, end=240, lr=0.01, min_keep=0, fill=False)]
