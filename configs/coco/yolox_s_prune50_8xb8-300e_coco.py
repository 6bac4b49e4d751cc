# YOLOX-s on COCO, pruned on the way to at most half of the operations; else mmdet's config.
_base_ = ["mmdet::yolox/yolox_s_8xb8-300e_coco.py", "../_base_/pruning/early_hook.py"]

custom_imports = dict(imports=["mmitp"], allow_failed_imports=False)
model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
prune = _base_.early
prune.input_shape = (640, 640)  # the operations are stated for
custom_hooks = [*_base_.custom_hooks, prune]
