# ResNet-56 for 32x32 images, option-A shortcuts: 853,018 parameters, 125,485,696 MACs (10 classes).
model = dict(
    type="ImageClassifier",
    backbone=dict(type="mmitp.ResNetCifar", depth=56, shortcut="A"),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=64,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
)
