# The recommended recipe: search early, then train what is small.
#
#     _base_ = ["./my_dense_config.py", "mmitp_configs/_base_/pruning/early.py"]
#     model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
#
# Masks train from 1/15 to 1/3 of the run under the closed loop, which ends at the target by itself. Then what they drop
# is cut out of the live network, in multiples of 8 channels, and the small network trains the other two thirds.
# There is no decay on the masks: the loop would only have to make up for it.
custom_hooks = [
    dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=1 / 15, end=1 / 3, divisor=8, slim_at_end=True),
]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
