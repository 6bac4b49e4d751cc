# what start_s0.pth leaves a network that is narrower by half of the operations (mmitp control), seed 0:
# the network of start_uniform50_s0.pth.
_base_ = ["../centernet_dla34x025_kitti1348_short_uniform50.py"]
