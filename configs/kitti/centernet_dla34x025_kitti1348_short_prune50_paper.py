# As centernet_dla34x025_kitti1348_short_prune50.py by the paper's own settings: a fixed b = 10 and a window from 1/15
# to 4/5 of the run, no floor under a layer's width, nothing switched back on at the freeze, masks kept to the end. lr
# keeps Optimizer 2's lr times the steps of its window at CIFAR-10's 0.01 * 220 * 196 = 431, see
# ../_base_/schedules/cifar10_short.py: 0.041 * 32 * 325 = 426. Masked steps cost 1.1 dense ones: 44 epochs.
_base_ = ["./centernet_dla34x025_kitti1348_short.py"]

model = dict(type="mmitp.MaskedModel", of="mmdet.CenterNet")
custom_hooks = [
    dict(
        type="mmitp.PruneHook",
        target=0.5,
        b=10,
        begin=1 / 15,
        end=4 / 5,
        lr=0.041,
        min_keep=0,
        fill=False,
        input_shape=(160, 512),
    ),
]

max_epochs = 44
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=max_epochs)]
