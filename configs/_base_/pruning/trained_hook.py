# The recipe for a run that starts from trained weights: channels of the whole network compete by the loss that their
# operations hold (push="fisher"), in a short window near the start, and the small network trains for the rest of the
# run. Beside any dense config whose checkpoint is the start:
#
#     _base_ = ["./my_dense.py", "CONFIGS/_base_/pruning/trained_hook.py"]
#     model = dict(type="mmitp.MaskedModel", of=_base_.model.type)
#     optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
#     custom_hooks = [*_base_.get("custom_hooks", []), _base_.trained]
#     load_from = "my_dense.pth"
trained = dict(
    type="mmitp.PruneHook",
    target=0.5,
    push="fisher",
    begin=1 / 16,
    end=3 / 16,
    divisor="auto",
    slim_at_end=True,
)
