"""Checkpoints that fit their network, or an error that says what does not."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint
from torch import Tensor, nn

from mmitp.engine.hooks.prune_hook import STATE_KEY
from mmitp.pruning import masked_layers


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads a checkpoint as mmengine does, onto the CPU.

    Raises:
        ValueError: there is no such file, or it is not one that torch wrote.
    """
    try:
        loaded = _load_checkpoint(path, map_location="cpu")
    except FileNotFoundError as error:
        raise ValueError(f"no checkpoint file {path!r}") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint, or a damaged one: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a checkpoint's state dict")
    return dict(loaded)


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
        state = checkpoint.get("state_dict", checkpoint)
        state = {re.sub(r"^module\.", "", key): value for key, value in state.items()}
        path, config = str(runner._load_from), runner.cfg.filename or "the config"
        if not masked_layers(model) and any(key.endswith("prune_mask") for key in state):
            raise ValueError(
                f"{path} carries masks, but {config} builds a network without: give the config it was trained with"
            )
        load_fitting(model, state, path, config, extra=True)
