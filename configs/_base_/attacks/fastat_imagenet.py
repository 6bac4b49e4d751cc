# FastAT on ImageNet (S1): eps 2/255 and alpha 2.5/255, random start, one step. The guard only warns, see
# fastat_cifar10.py.
fastat = [
    dict(type="mmitp.AdversarialHook", eps=2, alpha=2.5),
    dict(type="mmitp.CollapseGuardHook", num_batches=4, action="warn"),
]
