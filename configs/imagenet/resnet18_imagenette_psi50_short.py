# ResNet-18 on Imagenette at 64x64, at most 0.5 of the operations, CPU-sized schedule.
_base_ = ["./resnet18_imagenette_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
custom_hooks = [dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=1, end=8, lr=0.16, interval="iter")]
