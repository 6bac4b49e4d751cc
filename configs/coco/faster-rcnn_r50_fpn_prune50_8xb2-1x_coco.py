# Faster R-CNN R50-FPN on COCO, pruned on the way to at most half of the operations; else mmdet's config. The backbone
# starts from ImageNet's weights, and its frozen first stage stays dense; so do the linear layers of the box head.
_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "../_base_/pruning/early.py"]

custom_imports = dict(imports=["mmitp"], allow_failed_imports=False)
model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
prune = _base_.custom_hooks[0]
prune.input_shape = (800, 1344)  # the operations are stated for
custom_hooks = [prune]
