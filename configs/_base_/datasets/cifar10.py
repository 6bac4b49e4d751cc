# CIFAR-10 from the standard python batches in data/cifar10/cifar-10-batches-py (data/README.md). Images are held and
# augmented in memory a batch at a time, on the GPU where there is one, so that worker processes would only cost time.
data_preprocessor = dict(
    num_classes=10,
    # ImageNet's statistics, RGB: those of the public reference checkpoints, so that one config trains and tests them.
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=False,
)

train_dataloader = dict(
    batch_size=256,
    num_workers=0,
    collate_fn=dict(type="mmitp.take_batch"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="mmitp.FastCIFAR10", data_root="data/cifar10", split="train"),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=0,
    collate_fn=dict(type="mmitp.take_batch"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="mmitp.FastCIFAR10", data_root="data/cifar10", split="test"),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator
