# A check that training works: CenterNet-DLA34 at a quarter of its width learns a few real KITTI frames by heart. Trains
# and evaluates on every frame of data/kitti_few (training/image_2 and label_2) at half the resolution. No benchmark.
_base_ = ["./centernet_dla34_kitti.py"]

data_root = "data/kitti_few/"
input_size = (640, 192)  # width, height

model = dict(
    backbone=dict(width=0.25),
    neck=dict(in_channels=(16, 32, 64, 128)),
    bbox_head=dict(in_channels=16, feat_channels=64),
)

pack = dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="mmitp.ScaleShiftCrop", size=input_size),
    pack,
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="mmitp.ScaleShiftCrop", size=input_size),
    dict(type="LoadAnnotations", with_bbox=True),
    pack,
]
train_dataloader = dict(
    batch_size=5, num_workers=1, dataset=dict(data_root=data_root, ann_file="", pipeline=train_pipeline)
)
val_dataloader = dict(
    batch_size=5, num_workers=1, dataset=dict(data_root=data_root, ann_file="", pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(data_root=data_root)
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=60, val_interval=60)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=60, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=6), checkpoint=dict(interval=60, max_keep_ckpts=1))
