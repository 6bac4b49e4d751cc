# ResNet-18 on ImageNet, pruned in training to at most 0.3 of its operations (b = 10).
_base_ = ["./resnet18_imagenet.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.3, b=10, begin=7, end=80, lr=0.01, min_keep=0, fill=False)]
