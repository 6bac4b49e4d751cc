"""The paper's KITTI: cars only, a random 75 % / 25 % split of the 7,481 labelled frames (the seed is ours)."""

_base_ = ["./kitti.py"]

metainfo = dict(classes=("Car",))

train_dataloader = dict(dataset=dict(ann_file="", split="train75", split_seed=0, metainfo=metainfo))
val_dataloader = dict(dataset=dict(ann_file="", split="val25", split_seed=0, metainfo=metainfo))
test_dataloader = val_dataloader
