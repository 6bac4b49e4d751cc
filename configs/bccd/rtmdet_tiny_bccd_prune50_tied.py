# As rtmdet_tiny_bccd_prune50_brief.py with masks tied over streams: what is left has narrower tensors and little to
# gather.
_base_ = ["./rtmdet_tiny_bccd_prune50_brief.py"]

model = dict(prune=dict(share="stream"))
