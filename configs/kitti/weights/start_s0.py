# common start, trained on generated scenes, seed 0:
# the network of start_s0.pth.
_base_ = ["../centernet_dla34x025_scenes_kitti_size.py"]
