"""PruneHook(slim_at_end=True) in real Runners: the small network takes over in mid-run and nothing else changes."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import test_prune_hook as toy  # the toy Runner of the hook's other tests

from mmitp.engine.hooks import PruneHook
from mmitp.pruning import masked_layers

SGD = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-3))
ADAM = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=5e-3, weight_decay=1e-3), clip_grad=dict(max_norm=0.5))
PARAMWISE = dict(SGD, paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"prune_mask": dict(lr_mult=0.5)}))
CHECKPOINT = dict(checkpoint=dict(type="CheckpointHook", interval=1))
ITERS = dict(type="IterBasedTrainLoop", max_iters=30)
COSINE = [dict(type="CosineAnnealingLR", T_max=7, by_epoch=True)]


class Residual(toy.Toy):
    """The toy with a residual block, so that there are gathers and scatters."""

    def __init__(self, width=8, dtype=torch.float32):
        super().__init__(masked=False, width=width)
        self.body2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        toy.mask_model(self, linear=True)
        self.to(dtype)
        for layer in masked_layers(self).values():
            layer.prune_mask.data = layer.prune_mask.data.float()

    def forward(self, inputs, data_samples=None, mode="tensor"):
        inputs = inputs.to(self.stem.weight.dtype)
        x = self.norm(self.stem(inputs)).relu()
        x = (x + self.norm2(self.body2(self.body(x).relu()))).relu()
        x = self.fc(x.mean((2, 3)))
        if mode == "tensor":
            return x
        if mode == "loss":
            return dict(loss=nn.functional.cross_entropy(x, data_samples))
        return list(x.argmax(1))


class Losses(Hook):
    """Keeps the loss of every iteration."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(outputs["loss"].item())


def run(work_dir, slim, dtype=torch.float32, epochs=7, begin=0, end=2, extra_hooks=(), hook=None, model=None, **kwargs):
    """32 images in batches of 8: four iterations an epoch."""
    torch.manual_seed(3)
    losses = Losses()
    hook = hook or PruneHook(target=0.5, b=0, begin=begin, end=end, slim_at_end=slim)
    runner = toy.make_runner(
        work_dir,
        hook,
        epochs=epochs,
        model=model or Residual(dtype=dtype),
        extra_hooks=[losses, *extra_hooks],
        **kwargs,
    )
    runner.train()
    return runner, hook, losses.seen


@pytest.mark.parametrize("optim", [SGD, ADAM, PARAMWISE], ids=["sgd", "adam-clipped", "paramwise"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_losses_after_the_freeze_follow_the_masked_continuation(tmp_path, optim, dtype, bound):
    _, _, expected = run(tmp_path / "masked", False, dtype, optim=optim, param_scheduler=COSINE)
    runner, hook, losses = run(tmp_path / "slim", True, dtype, optim=optim, param_scheduler=COSINE)
    assert len(losses) == 28
    assert losses[:8] == expected[:8]
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True)) < bound
    assert not masked_layers(runner.model)
    assert hook.slimmed["macs_kept"] <= 0.5 * hook.slimmed["macs_dense"]
    params = {p for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
    assert params == set(runner.model.parameters())
    assert set(runner.optim_wrapper.optimizer.state) <= params
