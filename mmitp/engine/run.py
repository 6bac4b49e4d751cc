"""A Runner from a config, as every tool builds it."""

from __future__ import annotations

from mmengine import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner


def build_runner(cfg: Config) -> Runner:
    """Builds the config's runner (``runner_type``, mmengine's ``Runner`` by default)."""
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
