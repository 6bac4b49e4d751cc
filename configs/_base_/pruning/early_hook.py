# The hook of early.py, for dense configs that bring custom_hooks of their own (mmengine refuses a key that two bases
# share):
#
#     _base_ = ["./my_dense.py", "CONFIGS/_base_/pruning/early_hook.py"]
#     model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
#     optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
#     custom_hooks = [*_base_.custom_hooks, _base_.early]
early = dict(type="mmitp.PruneHook", target=0.5, b="auto", begin=1 / 15, end=1 / 3, divisor="auto", slim_at_end=True)
