# ResNet-20 on CIFAR-10, at most 0.3 of the operations, CPU-sized schedule (its base says how it is scaled).
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.3, b=10, begin=1, end=8, lr=0.16, min_keep=0, fill=False)]
