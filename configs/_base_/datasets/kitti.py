"""KITTI's 2D object benchmark: Pedestrian, Car and Cyclist, 3DOP split, CenterNet's preparation at 1280 x 384.

data/README.md says where the data goes. For generated scenes override ``data_root`` (in the dataloaders' datasets and
the evaluators). The split files ``ImageSets/train.txt`` (3,712 frames) and ``val.txt`` (3,769) are those of 3DOP.
"""

dataset_type = "mmitp.KittiDataset"
data_root = "data/kitti/"
metainfo = dict(classes=("Pedestrian", "Car", "Cyclist"))
input_size = (1280, 384)  # width, height; images are scaled by width, 375 rows become 386, of which 384 are kept

train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="mmitp.ScaleShiftCrop", size=input_size, prob=0.5, scale=0.4, shift=0.1),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
# Annotations are loaded last: they stay in the image's own coordinates, as the predictions are.
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="mmitp.ScaleShiftCrop", size=input_size),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file="ImageSets/train.txt",
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file="ImageSets/val.txt",
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="mmitp.KittiMetric", data_root=data_root, label_dir="training/label_2")
test_evaluator = val_evaluator
