# The main job, kitti/centernet_dla34_kitti_prune50.py, under a short name.
_base_ = ["./kitti/centernet_dla34_kitti_prune50.py"]
