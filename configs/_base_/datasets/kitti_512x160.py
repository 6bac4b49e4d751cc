"""KITTI as in kitti.py, prepared for runs of an hour or two on one core: 512 x 160, batches of 2, mirrored images too.

The folder decides which frames there are: KITTI-1348 (data/README.md), or the whole of the 3DOP split.
"""

_base_ = ["./kitti.py"]

input_size = (512, 160)  # width, height; 375 rows become 155, the rest is filled

train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),  # a few hundred frames are few
    dict(type="mmitp.ScaleShiftCrop", size=input_size, prob=0.5, scale=0.4, shift=0.1),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="mmitp.ScaleShiftCrop", size=input_size),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
# Loading in the training's own process, so that its processor time is the whole run's.
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
