"""Detectors of mmdet's, small enough for many tests: 8 channels where the real ones have 64."""

from typing import Any

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
PREPROCESSOR: dict[str, Any] = dict(
    type="mmdet.DetDataPreprocessor", mean=MEAN, std=STD, bgr_to_rgb=True, pad_size_divisor=32
)
CENTERNET: dict[str, Any] = dict(
    type="mmdet.CenterNet",
    data_preprocessor=PREPROCESSOR,
    backbone=dict(type="mmitp.DLA", depth=34, width=0.125),
    neck=dict(type="mmitp.DLAUp", in_channels=(8, 16, 32, 64), use_dcn=False),
    bbox_head=dict(
        type="mmitp.KittiCenterNetHead",
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        loss_center_heatmap=dict(type="mmdet.GaussianFocalLoss", loss_weight=1.0),
        loss_wh=dict(type="mmdet.L1Loss", loss_weight=0.1),
        loss_offset=dict(type="mmdet.L1Loss", loss_weight=1.0),
    ),
    test_cfg=dict(topk=10, local_maximum_kernel=3, max_per_img=10),
)
RETINANET: dict[str, Any] = dict(
    type="mmdet.RetinaNet",
    data_preprocessor=PREPROCESSOR,
    backbone=dict(type="mmdet.ResNet", depth=18, base_channels=8, stem_channels=8),
    neck=dict(
        type="mmdet.FPN",
        in_channels=[8, 16, 32, 64],
        out_channels=8,
        start_level=1,
        add_extra_convs="on_output",
        num_outs=5,
    ),
    bbox_head=dict(
        type="mmdet.RetinaHead",
        num_classes=3,
        in_channels=8,
        stacked_convs=1,
        feat_channels=8,
        anchor_generator=dict(
            type="mmdet.AnchorGenerator",
            octave_base_scale=4,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type="mmdet.DeltaXYWHBBoxCoder"),
        loss_cls=dict(type="mmdet.FocalLoss", use_sigmoid=True),
        loss_bbox=dict(type="mmdet.L1Loss"),
    ),
    train_cfg=dict(
        assigner=dict(type="mmdet.MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type="mmdet.PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(nms_pre=10, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=10),
)
