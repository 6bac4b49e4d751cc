"""ChannelsLastHook: a run in torch's ``channels_last`` layout, by config."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmitp.engine.attack import unwrap
from mmitp.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keeps the model in ``channels_last``, the layout in which convolutions in half precision are fastest on a GPU.

    The images need not be: the first convolution hands its output on in the layout of its weights. Results differ by
    rounding. ``custom_hooks = [dict(type="mmitp.ChannelsLastHook")]``; it takes no arguments.
    """

    # Before EMA copies the model.
    priority = "VERY_HIGH"

    def before_run(self, runner: Runner) -> None:
        """Lays out what the run begins with."""
        unwrap(runner.model).to(memory_format=torch.channels_last)

    def before_train_epoch(self, runner: Runner) -> None:
        """Slimming in mid-run makes parameters anew; what has the layout stays as it is."""
        self.before_run(runner)
