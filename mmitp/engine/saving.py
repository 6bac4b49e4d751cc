"""Checkpoints that survive a kill at any moment: written whole or not at all, the old one deleted after the new one is
safe, and with the gradients of an update that is half accumulated; and files of weights alone, taken for checkpoints.

:func:`protect` puts this into a Runner; no config has to name anything.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mmengine.runner
import mmengine.runner.runner as mmengine_runner
import torch
from mmengine.dist import get_world_size
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from mmitp.engine.attack import unwrap
from mmitp.engine.checkpoint import weights_of_checkpoint
from mmitp.engine.cli import raised_by_us
from mmitp.engine.ranks import watched
from mmitp.engine.safe_load import data_only, replaced, saved_bytes
from mmitp.engine.unfinished import GoOn, Progress
from mmitp.files import write_whole
from mmitp.values import is_number

__all__ = ["GRADIENTS", "BareWeights", "PendingGradients", "protect"]

#: Where a checkpoint keeps the gradients that wait for the next optimizer step.
GRADIENTS = "mmitp_pending_gradients"


@contextlib.contextmanager
def _whole_checkpoints() -> Iterator[None]:
    """Meanwhile mmengine writes checkpoints in the local file system by :func:`write_whole`."""
    original = mmengine_runner.save_checkpoint

    def save_checkpoint(checkpoint: Any, filename: str, file_client_args: Any = None, backend_args: Any = None) -> None:
        backend = None if file_client_args else get_file_backend(filename, backend_args=backend_args)
        if isinstance(backend, LocalBackend):
            write_whole(filename, saved_bytes(checkpoint))
        else:
            original(checkpoint, filename, file_client_args, backend_args)

    with (
        replaced(mmengine_runner, "save_checkpoint", save_checkpoint),
        replaced(mmengine.runner, "save_checkpoint", save_checkpoint),
    ):
        yield


class _DeleteLater:
    """A file backend that keeps in mind what it is to delete."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.deletions: list[tuple[Callable[[str], None], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.deletions.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.deletions.append((self._backend.rmtree, path))


def _delete_afterwards(hook: CheckpointHook, name: str) -> None:
    """Makes a method of the hook save before it deletes; mmengine's deletes before it saves."""
    save = getattr(hook, name)

    @functools.wraps(save)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if not hasattr(hook, "file_backend"):  # before_train makes it: validation alone has nothing to save
            return
        backend = _DeleteLater(hook.file_backend)
        with replaced(hook, "file_backend", backend):
            save(*args, **kwargs)
        for delete, path in backend.deletions:
            delete(path)

    setattr(hook, name, wrapped)


def _keep_to_own_folder(hook: CheckpointHook) -> None:
    """Deletes nothing elsewhere: which file was the best so far is read from the resumed checkpoint."""
    original = hook.before_train

    @functools.wraps(original)
    def before_train(runner: Runner) -> None:
        info = runner.message_hub.runtime_info
        kept = info.get("keep_ckpt_ids", [])
        if not isinstance(kept, list) or not all(isinstance(step, int) for step in kept):
            raise ValueError(f"{runner._load_from}: message_hub.keep_ckpt_ids must be whole numbers, got {kept!r}")
        best = info.get("best_score")
        if not (best is None or is_number(best) or best in (math.inf, -math.inf)):
            raise ValueError(f"{runner._load_from}: message_hub.best_score must be a number, got {best!r}")
        original(runner)
        if not isinstance(hook.file_backend, LocalBackend):
            return
        if not _lies_in(getattr(hook, "best_ckpt_path", None), hook.out_dir):
            hook.best_ckpt_path = None
        for key, path in getattr(hook, "best_ckpt_path_dict", {}).items():
            if not _lies_in(path, hook.out_dir):
                hook.best_ckpt_path_dict[key] = None

    hook.before_train = before_train


def _lies_in(path: Any, folder: Any) -> bool:
    """Whether a path is that of a file directly in a folder, and no link to elsewhere."""
    return isinstance(path, str) and os.path.dirname(os.path.realpath(path)) == os.path.realpath(folder)


class BareWeights(Hook):
    """Makes a checkpoint of a file that holds weights alone, as ``torch.save(model.state_dict(), path)`` writes them.

    The Runner itself takes such files, but its hooks read ``checkpoint["state_dict"]``: mmengine's EMAHook would end
    the run. Names that a wrapper has changed become the model's again (:func:`weights_of_checkpoint`).
    """

    priority = "HIGHEST"  # before those that read it

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Moves the weights, in place, to where a checkpoint has them."""
        if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
            weights = copy.copy(checkpoint)
            checkpoint.clear()
            checkpoint["state_dict"] = weights
        if isinstance(checkpoint.get("state_dict"), Mapping):
            checkpoint["state_dict"] = weights_of_checkpoint(checkpoint, unwrap(runner.model))


class PendingGradients(Hook):
    """Keeps gradients that wait for the optimizer's next step in the checkpoint, and gives them back on resume.

    Gradients accumulate over several iterations (``accumulative_counts``), and a checkpoint may fall between two steps.
    Several processes have gradients of their own, and only one of them writes: there the checkpoint says that they are
    missing, and resuming it is refused (:mod:`mmitp.engine.resume`).
    """

    priority = "LOWEST"  # after all that changes the network

    def __init__(self) -> None:
        self._kept: Mapping[str, torch.Tensor] | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Adds the gradients, if some are pending."""
        if not pending(runner.optim_wrapper):
            return
        named = unwrap(runner.model).named_parameters()
        gradients = {name: p.grad.detach().cpu() for name, p in named if p.grad is not None}
        checkpoint[GRADIENTS] = gradients if get_world_size() == 1 else None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Takes note of them; weights alone bring none."""
        if getattr(runner, "_resume", False):
            self._kept = checkpoint.get(GRADIENTS)

    def before_train(self, runner: Runner) -> None:
        """Gives them back."""
        if not self._kept:
            return
        parameters = dict(unwrap(runner.model).named_parameters())
        for name, gradient in self._kept.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != gradient.shape:
                raise ValueError(f"{runner._load_from}: {GRADIENTS}.{name} fits no parameter of the network")
            parameter.grad = gradient.to(parameter)
        runner.logger.info(
            f"the gradients of {len(self._kept)} parameters, which wait for a step, are restored as well"
        )
        self._kept = None


class EnoughRoom(Hook):
    """Looks, before the first iteration, whether the disk has room for what the run will save."""

    priority = "LOWEST"  # CheckpointHook knows its folder then

    def before_train(self, runner: Runner) -> None:
        """Warns where not all checkpoints will fit.

        Raises:
            ValueError: not even one does.
        """
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and isinstance(hook.file_backend, LocalBackend):
                self._look(runner, hook)

    @staticmethod
    def _look(runner: Runner, hook: CheckpointHook) -> None:
        folder = hook.out_dir
        while not os.path.isdir(folder):
            folder = os.path.dirname(os.path.abspath(folder))
        free, each = shutil.disk_usage(folder).free, checkpoint_size(runner)
        length, done = (runner.max_epochs, runner.epoch) if hook.by_epoch else (runner.max_iters, runner.iter)
        count = max((length - done) // hook.interval, 1) if hook.interval > 0 else 1
        if hook.max_keep_ckpts > 0:
            count = min(count, hook.max_keep_ckpts + 1)  # the new one is there before the old one goes
        if each > free:
            raise ValueError(
                f"{hook.out_dir} has {free / 2**20:,.0f} MiB free, and one checkpoint takes about "
                f"{each / 2**20:,.0f}: make room, or take another --work-dir"
            )
        if count * each > free:
            runner.logger.warning(
                f"{hook.out_dir} has {free / 2**20:,.0f} MiB free, and {count} checkpoints take about "
                f"{count * each / 2**20:,.0f}: make room, or set default_hooks.checkpoint.max_keep_ckpts"
            )


def checkpoint_size(runner: Runner) -> int:
    """Bytes that a checkpoint takes at least: weights, averaged ones, and what the optimizer keeps of each weight."""
    model = unwrap(runner.model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    copies = 1 + sum(isinstance(hook, EMAHook) for hook in runner.hooks)
    defaults = getattr(getattr(runner.optim_wrapper, "optimizer", None), "defaults", {})
    moments = 2 if "betas" in defaults else int(bool(defaults.get("momentum")))
    return (copies + moments) * weights + copies * buffers


def pending(wrapper: Any) -> bool:
    """Whether gradients have been accumulated and not yet used."""
    if isinstance(wrapper, OptimWrapperDict):
        return any(map(pending, wrapper.values()))
    if not isinstance(wrapper, OptimWrapper):
        return False
    return wrapper._inner_count % wrapper._accumulative_counts != 0 and wrapper._inner_count != wrapper._max_counts


def protect(runner: Runner, trust: bool = False) -> Runner:
    """Makes a Runner read checkpoints as data, write them whole, and delete old ones after new ones are safe.

    Nothing beyond this Runner changes: mmengine's functions are exchanged while one of its loops runs.

    Args:
        runner: built, not yet running.
        trust: also load files that may run code.
    """
    runner.register_hook(BareWeights())
    runner.register_hook(PendingGradients())
    runner.register_hook(EnoughRoom())
    runner.register_hook(progress := Progress())
    runner.register_hook(GoOn(progress))
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            _delete_afterwards(hook, "_save_checkpoint_with_step")
            _delete_afterwards(hook, "_save_best_checkpoint")
            _keep_to_own_folder(hook)
    for name in ("train", "val", "test", "load_checkpoint"):
        setattr(runner, name, _guarded(runner, name, trust))
    runner.load_or_resume = _explained(runner)
    if not trust:
        runner.load_checkpoint = _without_program(runner.load_checkpoint)
    return runner


def _guarded(runner: Runner, name: str, trust: bool) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(runner, name)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        loop = contextlib.nullcontext() if name == "load_checkpoint" else watched(runner)
        with data_only(trust), _whole_checkpoints(), loop:
            return method(*args, **kwargs)

    return run


def _explained(runner: Runner) -> Callable[[], None]:
    """Reading a checkpoint fails with its name, whatever other people's code makes of what it holds."""
    load = runner.load_or_resume

    @functools.wraps(load)
    def run() -> None:
        try:
            load()
        except Exception as error:  # all kinds
            if raised_by_us(error):
                raise
            text = " ".join(str(error).split())
            raise ValueError(
                f"{runner._load_from}: what it holds cannot be loaded: {type(error).__name__}: {text}"
            ) from error

    return run


def _without_program(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Drops the config of a checkpoint that mmengine would run on resume; what mmengine itself saves, it does not."""

    @functools.wraps(load)
    def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = load(*args, **kwargs)
        if isinstance(meta := checkpoint.get("meta"), dict):
            meta.pop("config", None)
        return checkpoint

    return run
