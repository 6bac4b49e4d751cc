"""KITTI as in kitti.py, prepared for runs of an hour or two on one core: 512 x 160, batches of 2, mirrored images too.

The folder decides which frames there are: KITTI-1348 (data/README.md), or the whole of the 3DOP split.
"""

_base_ = ["./kitti.py"]

input_size = (512, 160)  # width, height; 375 rows become 155, the rest is filled

load, annotations, prepare, pack = _base_.train_pipeline
flip = dict(type="RandomFlip", prob=0.5)  # a few hundred frames are few
train_pipeline = [load, annotations, flip, dict(prepare, size=input_size), pack]
test_pipeline = [load, dict(_base_.test_pipeline[1], size=input_size), annotations, pack]
del load, annotations, prepare, pack, flip
# Loading in the training's own process, so that its processor time is the whole run's.
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
