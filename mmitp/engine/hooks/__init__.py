"""Hooks: they schedule, and hold no mathematics."""

from mmitp.engine.hooks.adversarial_hook import AdversarialHook
from mmitp.engine.hooks.channels_last import ChannelsLastHook
from mmitp.engine.hooks.collapse_guard import CollapseGuardHook
from mmitp.engine.hooks.distill_hook import DistillHook
from mmitp.engine.hooks.prune_hook import PruneHook

__all__ = ["AdversarialHook", "ChannelsLastHook", "CollapseGuardHook", "DistillHook", "PruneHook"]
