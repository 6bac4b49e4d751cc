"""Checkpoints that fit their network, or an error that says what does not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from mmengine.runner.checkpoint import _load_checkpoint
from torch import Tensor, nn

from mmitp.engine.finite import diverged
from mmitp.engine.hooks.prune_hook import STATE_KEY
from mmitp.engine.safe_load import data_only
from mmitp.models.slim_config import FURTHER
from mmitp.pruning import masked_layers
from mmitp.values import is_count, is_size

# What wrappers add to names: a compiled part may stand anywhere, a distributed one holds the whole network.
_WRAPPERS = (r"(?<![^.])_orig_mod\.", r"^(module\.)+")


def read_checkpoint(path: str, trust: bool = False) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: as data, with its checksums compared, and with what it must hold looked at.

    Args:
        path: file or URL, as mmengine takes it.
        trust: also take a file that may run code (see :func:`mmitp.engine.safe_load.load_data`).

    Raises:
        ValueError: there is no such file, it is damaged, wants to run code, or does not hold what a checkpoint does.
    """
    try:
        with data_only(trust):
            loaded = _load_checkpoint(path, map_location="cpu")
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is a folder, not a checkpoint" if os.path.isdir(path) else f"no checkpoint file {path!r}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a checkpoint's state dict")
    check_content(loaded, path)
    return dict(loaded)


def check_content(loaded: Mapping[str, Any], path: str) -> None:
    """Looks at what tools read of a checkpoint: its weights, and what it says of its budget.

    Raises:
        ValueError: with file and key.
    """
    if not loaded:
        raise ValueError(f"{path} is an empty checkpoint")
    for key in ("state_dict", "meta", STATE_KEY):
        if not isinstance(loaded.get(key, {}), Mapping):
            raise ValueError(f"{path}: {key!r} is a {type(loaded[key]).__name__}, not a dictionary")
    state = loaded.get("state_dict", loaded)
    if not state:
        raise ValueError(f"{path}: 'state_dict' is empty")
    if state is loaded and not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds no weights, for it lacks state_dict: {_instead(loaded)}")
    broken = []
    for key, value in state.items():
        if not isinstance(value, Tensor):
            if state is not loaded and not str(key).endswith("_extra_state"):
                raise ValueError(f"{path}: state_dict[{key!r}] is a {type(value).__name__}, not a tensor")
        elif (value.is_floating_point() or value.is_complex()) and bool(diverged(str(key), value)):
            broken.append(key)
    if broken:
        raise ValueError(
            f"{path} holds NaN or infinite values in {len(broken)} of {len(state)} entries, the first "
            f"{broken[0]!r}: the run had diverged. Take a checkpoint from before"
        )
    for key, known in ((STATE_KEY, loaded.get(STATE_KEY, {})), ("meta.mmitp", loaded.get("meta", {}).get("mmitp", {}))):
        if not isinstance(known, Mapping):
            raise ValueError(f"{path}: {key} is a {type(known).__name__}, not a dictionary")
        size, channels = known.get("input_shape"), known.get("channels")
        if size is not None and not is_size(size):
            raise ValueError(f"{path}: {key}.input_shape must be two whole numbers (H, W), got {size!r}")
        if channels is not None and not is_count(channels):
            raise ValueError(f"{path}: {key}.channels must be a whole number, got {channels!r}")
    slimmed = loaded.get(STATE_KEY, {}).get("slimmed")
    if slimmed is not None and not (isinstance(slimmed, Mapping) and {"spec", "macs_dense", "macs_kept"} <= {*slimmed}):
        raise ValueError(f"{path}: {STATE_KEY}.slimmed lacks spec, macs_dense or macs_kept")


def _instead(loaded: Mapping[str, Any]) -> str:
    """What a file without weights in their places has, and where they seem to be."""
    names = ", ".join(repr(str(key)) for key in list(loaded)[:5])
    said = f"its keys are {names}" + (", ..." if len(loaded) > 5 else "")
    for key, value in loaded.items():
        if isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values()):
            return f"{said}. If those under {key!r} are the network's, save them as dict(state_dict=...)"
    return said


def weights_of_checkpoint(loaded: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """The state dict of a checkpoint by the model's own names.

    Prefixes that wrappers leave are taken off, DataParallel's and DistributedDataParallel's ``module.`` and
    torch.compile's ``_orig_mod.``, wherever the model itself has no such part.
    """
    state, own = loaded.get("state_dict", loaded), model.state_dict().keys()
    for prefix in _WRAPPERS:
        if not any(re.search(prefix, key) for key in own) and any(re.search(prefix, key) for key in state):
            state = {re.sub(prefix, "", key): value for key, value in state.items()}
    return state


def known_input(loaded: Mapping[str, Any]) -> tuple[tuple[int, int] | None, int | None]:
    """Image size (H, W) in pixels and channels that a checkpoint's budget was for; None for what it does not say."""
    kept = loaded.get(STATE_KEY) or loaded.get("meta", {}).get("mmitp") or {}
    size, channels = kept.get("input_shape"), kept.get("channels")
    return (int(size[0]), int(size[1])) if size is not None else None, int(channels) if channels is not None else None


def load_fitting(model: nn.Module, state: Mapping[str, Tensor], path: str, config: str, extra: bool = False) -> None:
    """Loads a state dict that fills the whole model; a dense one fills a masked model.

    Args:
        model: to load into.
        state: what to load.
        path: the checkpoint's, for the message.
        config: the config's name, for the message.
        extra: whether the state dict may hold more than the model has.

    Raises:
        ValueError: keys are missing or too many, or shapes differ.
    """
    try:
        misfit = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = str(error).splitlines()  # a line for every tensor
        raise ValueError("\n".join([f"{path} does not fit {config}: {lines[0]}", *lines[1:4]])) from error
    missing, unexpected = misfit.missing_keys, [] if extra else misfit.unexpected_keys
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {config}: {len(missing)} keys missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )


def not_final(model: nn.Module, path: str) -> str:
    """A line of warning where the masks of a loaded model are not frozen yet, else nothing."""
    if all(layer.mask_frozen for layer in masked_layers(model).values()):
        return ""
    return (
        f"warning: the masks of {path} are not frozen: it is from before the end of the pruning window, and its "
        "operations may lie above the target\n"
    )


class FitHook(Hook):
    """Stops an evaluation whose weights do not fill the network; the Runner itself only warns.

    Comes last, after hooks that rebuild the network or exchange the weights.
    """

    priority = "LOWEST"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Raises ``ValueError`` where keys are missing, shapes differ, or masks would be ignored."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        state = weights_of_checkpoint(checkpoint, model)
        path, config = str(runner._load_from), runner.cfg.filename or "the config"
        if not masked_layers(model) and any(key.endswith("prune_mask") for key in state):
            raise ValueError(
                f"{path} carries masks, but {config} builds a network without: give the config it was trained with"
            )
        load_fitting(model, state, path, config, extra=True)


class StartCheck(Hook):
    """Stops a training whose ``load_from`` is another network's; the Runner leaves at random what does not fit.

    Heads for other classes are no reason, nor is a checkpoint of a part of the network. Comes last, as
    :class:`FitHook`.
    """

    priority = "LOWEST"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Raises ``ValueError`` where nothing fits, where more shapes differ than agree, or for a slimmed network's
        weights in a wider one."""
        if not isinstance(runner._train_loop, BaseLoop) or getattr(runner, "_resume", False):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        own = model.state_dict()
        state = {key: value for key, value in weights_of_checkpoint(checkpoint, model).items() if value.dim()}
        shared = [key for key in state if key in own]
        other = [key for key in shared if state[key].shape != own[key].shape]
        gathers = any(key not in own and key.endswith((".in_index", ".out_index")) for key in state)
        small = bool(other) and (gathers or "macs" in checkpoint.get("meta", {}).get("mmitp", {}))
        if shared and not small and 2 * len(other) <= len(shared):
            return
        start = f"load_from: {runner._load_from} does not fit {runner.cfg.filename or 'the config'}: "
        if not shared:
            first, named = next(iter(state), None), next(iter(own), None)
            raise ValueError(f"{start}no name in it is one of the network's (it has {first!r}, the network {named!r})")
        start += (
            f"{len(other)} of the {len(shared)} tensors that both have are of other shapes ({other[0]!r} is "
            f"{tuple(state[other[0]].shape)} there and {tuple(own[other[0]].shape)} here) and would stay random. "
        )
        if small:
            raise ValueError(f"{start}It is a smaller network's: train that on by the config.py beside it; {FURTHER}")
        raise ValueError(f"{start}Give weights of this network, or leave load_from out")
