# ResNet-56 on CIFAR-10, at most 0.5 of the operations by the recommended recipe in the paper's 300 epochs: masks train
# from epoch 20 to 100 under the closed loop (without decay), then the small network takes
# the masked one's place.
_base_ = ["./resnet56_cifar10.py", "../_base_/pruning/early.py"]

model = dict(type="mmitp.MaskedModel", of="mmpretrain.ImageClassifier")
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"prune_mask": dict(decay_mult=0.0)}))
