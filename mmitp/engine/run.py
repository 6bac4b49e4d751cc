"""A Runner from a config, as every tool builds it."""

from __future__ import annotations

import os
import platform

import torch
from mmengine import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from mmitp.engine.checkpoint import StartCheck
from mmitp.engine.classes import ClassCheck
from mmitp.engine.ranks import bound_waiting
from mmitp.engine.resume import ScheduleCheck, settle_start
from mmitp.engine.saving import protect


def build_runner(cfg: Config, trust: bool = False) -> Runner:
    """Builds the config's runner (``runner_type``, mmengine's ``Runner`` by default).

    It resumes from the newest good checkpoint (:mod:`mmitp.engine.resume`) and does what is left of that one's epoch
    (:mod:`mmitp.engine.unfinished`), reads checkpoints as data, writes them whole, and deletes old ones after new ones
    are safe (:mod:`mmitp.engine.saving`). No process waits for another longer than its time-out
    (:mod:`mmitp.engine.ranks`). Training begins with a look at the classes of data and network
    (:mod:`mmitp.engine.classes`), and weights of another network to start from are refused
    (:class:`~mmitp.engine.checkpoint.StartCheck`).

    Args:
        cfg: the config; ``load_from`` becomes the checkpoint that a run with ``resume`` alone goes on from.
        trust: also load checkpoints that may run code.

    Raises:
        ValueError: ``load_from`` cannot be read or cannot be resumed, or all checkpoints to resume from are damaged; or
            ``env_cfg.dist_cfg.timeout`` is no time.
    """
    bound_waiting(cfg)
    settle_start(cfg, trust)
    runner = protect(RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg), trust)
    runner.register_hook(ClassCheck())
    runner.register_hook(ScheduleCheck())
    runner.register_hook(StartCheck())
    return runner


def check_launcher(launcher: str, local_rank: int = 0) -> None:
    """Raises ``ValueError`` where ``--launcher pytorch`` was given and no launcher has started this process.

    ``local_rank`` is what old launchers give as an option; mmengine reads it from the environment.
    """
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if launcher == "pytorch" and missing:
        raise ValueError(
            f"--launcher pytorch: {', '.join(missing)} not set; start the tool by "
            "`python -m torch.distributed.run --nproc_per_node N -m mmitp train ...`"
        )


def device_of(model: nn.Module) -> str:
    """Where a model is, with the device's name: ``'cuda:0 (NVIDIA H100)'``, ``'cpu (x86_64, 2 threads)'``."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)
