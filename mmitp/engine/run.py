"""A Runner from a config, as every tool builds it."""

from __future__ import annotations

import os
import platform

import torch
from mmengine import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn


def build_runner(cfg: Config) -> Runner:
    """Builds the config's runner (``runner_type``, mmengine's ``Runner`` by default)."""
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


def check_launcher(launcher: str) -> None:
    """Raises ``ValueError`` where ``--launcher pytorch`` was given and no launcher has started this process."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if launcher == "pytorch" and missing:
        raise ValueError(
            f"--launcher pytorch: {', '.join(missing)} not set; start the tool by "
            "`python -m torch.distributed.run --nproc_per_node N tools/...`"
        )


def device_of(model: nn.Module) -> str:
    """Where a model is, with the device's name: ``'cuda:0 (NVIDIA H100)'``, ``'cpu (x86_64, 2 threads)'``."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)
