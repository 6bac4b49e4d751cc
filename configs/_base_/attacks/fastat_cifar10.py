# FastAT on CIFAR-10 (S1, S2): eps 8/255 and alpha 10/255, random start, one step. The guard only warns: the published
# method goes on whatever happens; action="restore_switch" would mend a collapsed run.
fastat = [
    dict(type="mmitp.AdversarialHook", eps=8, alpha=10),
    dict(type="mmitp.CollapseGuardHook", num_batches=1, action="warn"),
]
