"""ChannelsLastHook in a real Runner: weights, averages and the small network in one layout, and the same training."""

import sys
from pathlib import Path

import torch
from mmengine.hooks import EMAHook

sys.path.insert(0, str(Path(__file__).parent))
import test_prune_hook as toy  # the toy Runner of the hook's other tests

from mmitp.engine.hooks import PruneHook


def run(work_dir, *hooks):
    prune = PruneHook(target=0.5, b="auto", begin=0, end=2, slim_at_end=True)
    runner = toy.make_runner(work_dir, prune, epochs=4, extra_hooks=[dict(type="EMAHook"), *hooks])
    runner.train()
    return runner


def test_weights_averages_and_the_slimmed_network_are_in_channels_last(tmp_path):
    plain, laid = run(tmp_path / "plain"), run(tmp_path / "laid", dict(type="mmitp.ChannelsLastHook"))
    averaged = next(hook for hook in laid.hooks if isinstance(hook, EMAHook)).ema_model.module
    images = [p for p in laid.model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert images
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images)
    assert not any(
        p.is_contiguous(memory_format=torch.channels_last) for p in plain.model.parameters() if p.shape[2:].numel() > 1
    )
    assert laid.model.body.weight.shape[1] < 8
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(laid.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert averaged.body.weight.shape == laid.model.body.weight.shape
