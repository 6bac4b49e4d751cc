# ResNet-20 for 32x32 images, option-A shortcuts: 269,722 parameters, 40,551,040 MACs (10 classes).
model = dict(
    type="ImageClassifier",
    backbone=dict(type="mmitp.ResNetCifar", depth=20, shortcut="A"),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=64,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
)
