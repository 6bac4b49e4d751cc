# ResNet-50 on ImageNet, pruned in training to at most 0.7 of its operations (b = 10).
_base_ = ["./resnet50_imagenet.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.7, b=10, begin=7, end=80, lr=0.01, min_keep=0, fill=False)]
