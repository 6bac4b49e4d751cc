# The main job's network on generated scenes, dense, sized for minutes on two CPU cores: a quarter of its width, 384x128
# frames. data/scenes comes from tools/make_scenes.py; `make demo` makes it too.
_base_ = ["../kitti/centernet_dla34_kitti.py"]

data_root = "data/scenes/"
input_size = (384, 128)  # width, height

model = dict(
    backbone=dict(width=0.25),
    neck=dict(in_channels=(16, 32, 64, 128)),
    bbox_head=dict(in_channels=16, feat_channels=64),
)

train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="mmitp.ScaleShiftCrop", size=input_size, prob=0.2, scale=0.2, shift=0.1),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="mmitp.ScaleShiftCrop", size=input_size),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(data_root=data_root)
test_evaluator = val_evaluator

# A short run wants a larger step than 250 epochs do.
train_cfg = dict(max_epochs=7, val_interval=7)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=7, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=7, max_keep_ckpts=1))
