# RTMDet-tiny on KITTI at 640x192, dense: mmdet's own config with KITTI's data, for small hardware. SyncBN becomes BN
# (one device), mosaic and mix-up give way to CenterNet's preparation of KITTI, and random weights take the place of
# ImageNet's (`--cfg-options load_from=...` for others).
_base_ = ["mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"]

custom_imports = dict(imports=["mmitp"], allow_failed_imports=False)
data_root = "data/kitti/"
metainfo = dict(classes=("Pedestrian", "Car", "Cyclist"))
input_size = (640, 192)  # width, height
norm_cfg = dict(type="BN")

model = dict(
    backbone=dict(norm_cfg=norm_cfg, init_cfg=None),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(num_classes=3, norm_cfg=norm_cfg),
    test_cfg=dict(nms_pre=1000, max_per_img=100),
)

meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="mmitp.ScaleShiftCrop", size=input_size, prob=0.8, scale=0.4, shift=0.1),
    dict(type="PackDetInputs", meta_keys=meta_keys),
]
# The last epochs see frames as they are, as in mmdet's config.
train_pipeline_stage2 = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="mmitp.ScaleShiftCrop", size=input_size),
    dict(type="PackDetInputs", meta_keys=meta_keys),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="mmitp.ScaleShiftCrop", size=input_size),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=meta_keys),
]

dataset = dict(_delete_=True, type="mmitp.KittiDataset", data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    drop_last=True,
    dataset=dict(dataset, ann_file="ImageSets/train.txt", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=2,
    dataset=dict(dataset, ann_file="ImageSets/val.txt", test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type="mmitp.KittiMetric", data_root=data_root, label_dir="training/label_2")
test_evaluator = val_evaluator

# mmdet's schedule in proportion, for batches of 8: 100 epochs, the last 10 without augmentation.
max_epochs = 100
train_cfg = dict(max_epochs=max_epochs, val_interval=10, dynamic_intervals=None)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=300),
    dict(
        type="CosineAnnealingLR",
        eta_min=5e-5,
        begin=max_epochs // 2,
        end=max_epochs,
        T_max=max_epochs // 2,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
# mmdet's own hooks and settings, but for the epoch of the switch.
ema = dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.0002, update_buffers=True, priority=49)
switch = dict(type="PipelineSwitchHook", switch_epoch=max_epochs - 10, switch_pipeline=train_pipeline_stage2)
custom_hooks = [ema, switch]
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=1))
randomness = dict(seed=0)
