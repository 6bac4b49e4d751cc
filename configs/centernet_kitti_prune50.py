# CenterNet-DLA34 on KITTI, pruned during its training to at most half of the whole model's MACs (S1, section S.3).
_base_ = ["./centernet_kitti.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.CenterNet")

# The masks sit in Optimizer 2's SGD alone (lr_mult 0 takes them out of Adam's hands): Adam would normalise their small
# task gradients to steps of about its learning rate and drown the ranking in noise. So they carry no weight decay either.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(lr_mult=0.0, decay_mult=0.0)}))

# S1's window of 20 to 240 of 300 epochs in proportion. lr 0.01 with a fixed b = 10 would never move the 12,512 masks of
# this network in 250 epochs; 'auto' pushes as hard as the path to the target needs.
custom_hooks = [
    dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=17, end=200, lr=0.01, input_shape=(384, 1280)),
]
