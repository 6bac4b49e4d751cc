# control: built narrower, common start, seed 0:
# the network of started_narrow50_s0.pth.
_base_ = ["../centernet_dla34x025_kitti1348_short_narrow50.py"]
