# As rtmdet_tiny_bccd_prune50_brief.py, but masks go by the loss that a multiply-accumulate of theirs holds, over the
# whole network.
_base_ = ["./rtmdet_tiny_bccd_prune50_brief.py"]

ema, switch, prune = _base_.custom_hooks
prune.push = "fisher"
custom_hooks = [ema, switch, prune]
