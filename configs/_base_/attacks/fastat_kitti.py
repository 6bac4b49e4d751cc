# FastAT for CenterNet: every training image is attacked by one random-start step on the detector's whole training loss.
# eps 2/255 and alpha 2.5/255 are ours (S1 has no robust detector), ImageNet's values. The guard probes by the loss.
fastat = [
    dict(type="mmitp.AdversarialHook", eps=2, alpha=2.5),
    dict(type="mmitp.CollapseGuardHook", num_batches=1, action="warn"),
]
