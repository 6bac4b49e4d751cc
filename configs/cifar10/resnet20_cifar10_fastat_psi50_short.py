# ResNet-20 on CIFAR-10, trained by FastAT and pruned in the same run to at most 0.5 of its operations, CPU-sized
# schedule (its base says how it is scaled).
_base_ = ["./resnet20_cifar10_fastat_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [
    dict(type="mmitp.PruneHook", target=0.5, b=10, begin=1, end=4, lr=0.37, min_keep=0, fill=False),
    *_base_.fastat,
]
