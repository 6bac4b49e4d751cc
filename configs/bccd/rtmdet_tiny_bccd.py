# RTMDet-tiny on BCCD (blood cells: 205 photos for training, 87 for validation, 72 for the test), dense. Own data in
# COCO's format, at 256x192 for one CPU core. mmdet's config but for what stands here: classes, input size, BN for
# SyncBN (one device), random weights (`--cfg-options load_from=...` for others), and augmentation for few photos.
_base_ = ["mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"]

custom_imports = dict(imports=["mmitp"], allow_failed_imports=False)
data_root = "data/bccd/"
metainfo = dict(classes=("RBC", "WBC", "Platelets"))
input_size = (256, 192)  # width, height; the photos have 640x480
norm_cfg = dict(type="BN")

model = dict(
    backbone=dict(norm_cfg=norm_cfg, init_cfg=None),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(num_classes=3, norm_cfg=norm_cfg),
    test_cfg=dict(nms_pre=1000, max_per_img=100),
)

# Cells have no up and no down.
flip = dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"])
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=input_size, ratio_range=(0.8, 1.4), keep_ratio=True),
    dict(type="RandomCrop", crop_size=input_size),
    dict(type="YOLOXHSVRandomAug"),
    flip,
    dict(type="Pad", size=input_size, pad_val=dict(img=(114, 114, 114))),
    dict(type="PackDetInputs"),
]
# The last epochs see whole photos, as in mmdet's config.
train_pipeline_stage2 = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=input_size, keep_ratio=True),
    flip,
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="Resize", scale=input_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

dataset = dict(
    _delete_=True,
    type="CocoDataset",
    data_root=data_root,
    metainfo=metainfo,
    data_prefix=dict(img="images/"),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    pin_memory=False,
    drop_last=True,
    dataset=dict(dataset, ann_file="annotations/train.json", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(dataset, ann_file="annotations/val.json", test_mode=True, pipeline=test_pipeline),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(dataset, ann_file="annotations/test.json", test_mode=True, pipeline=test_pipeline),
)
val_evaluator = dict(ann_file=data_root + "annotations/val.json")
test_evaluator = dict(ann_file=data_root + "annotations/test.json")

# mmdet's schedule in proportion, for batches of 2.
max_epochs = 22
train_cfg = dict(max_epochs=max_epochs, val_interval=5, dynamic_intervals=None)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        begin=max_epochs // 2,
        end=max_epochs,
        T_max=max_epochs // 2,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
# mmdet's own hooks and settings, but for the epoch of the switch.
ema = dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.0002, update_buffers=True, priority=49)
switch = dict(type="PipelineSwitchHook", switch_epoch=max_epochs * 9 // 10, switch_pipeline=train_pipeline_stage2)
custom_hooks = [ema, switch]
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=1))
randomness = dict(seed=0)
