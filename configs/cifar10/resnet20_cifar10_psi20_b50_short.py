# ResNet-20 on CIFAR-10, at most 0.2 of the operations (b = 50), CPU-sized schedule (its base says how it is scaled).
_base_ = ["./resnet20_cifar10_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.2, b=50, begin=1, end=8, lr=0.16, min_keep=0, fill=False)]
