# The early-freeze recipe: search early, then train what is small. Masks train from 1/15 to 1/3 of the run. Then what
# they drop is cut out of the live network, in multiples of 8 channels (less in narrow layers), and
# the small network trains on.
# Beside any dense config without custom_hooks of its own:
#
#     _base_ = ["./my_dense.py", "CONFIGS/_base_/pruning/early.py"]
#     model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
#     optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
#
# The last line takes the masks out of weight decay, so that the loop alone moves them. Another target:
# `prune = _base_.custom_hooks[0]`, `prune.target = 0.3`, `custom_hooks = [prune]`. Beside a dense config with
# custom_hooks: early_hook.py. With masks tied over residual streams: ../../cifar10/resnet20_cifar10_psi30_early.py.
_base_ = ["./early_hook.py"]

custom_hooks = [_base_.early]
