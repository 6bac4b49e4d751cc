# CenterNet-DLA34 to at most half of the whole model's MACs within 250 epochs.
#
# The masks sit in Adam, beside the weights, without weight decay (this Adam has none). Adam takes the scale out of
# their task gradients and so gives a ranking that layers can share. A trial with the masks in Optimizer 2's SGD alone
# (lr 0.01) and a push weighed by cost emptied whole layers. The push is the least that keeps the network on its path
# (b = "auto"): a fixed b = 10 at lr 0.01 would never move the 12,512 masks of this network in 250 epochs. lr now only
# weighs the raw task gradient that Optimizer 2 adds, hence small. The window is S1's 20 to 240 of 300 epochs in
# proportion.
custom_hooks = [
    dict(
        type="mmitp.PruneHook",
        target=0.5,
        b="auto",
        begin=17,
        end=200,
        lr=1e-4,
        fill=True,
        input_shape=(384, 1280),
    ),
]
