# CenterNet with DLA-34 ("Objects as Points"), deformable convolutions in the neck, KITTI's three classes.
# At 384x1280: 61.4565 GMACs (offset and transposed convolutions counted), 19,656,103 parameters.
model = dict(
    type="mmdet.CenterNet",
    data_preprocessor=dict(
        type="mmdet.DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    # ImageNet weights: backbone.init_cfg=dict(type="Pretrained", checkpoint="path/to/dla34-ba72cf86.pth")
    backbone=dict(type="mmitp.DLA", depth=34, width=1.0),
    neck=dict(type="mmitp.DLAUp", in_channels=(64, 128, 256, 512), use_dcn=True),
    bbox_head=dict(
        type="mmitp.KittiCenterNetHead",
        num_classes=3,
        in_channels=64,
        feat_channels=256,
        loss_center_heatmap=dict(type="mmdet.GaussianFocalLoss", loss_weight=1.0),
        loss_wh=dict(type="mmdet.L1Loss", loss_weight=0.1),
        loss_offset=dict(type="mmdet.L1Loss", loss_weight=1.0),
    ),
    train_cfg=None,
    test_cfg=dict(topk=100, local_maximum_kernel=3, max_per_img=100),
)
