"""Slimmed networks as config and weights: the builder that gives a dense model the structure of a spec."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine import Config
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from mmitp.engine.safe_load import saved_bytes
from mmitp.files import write_whole
from mmitp.pruning import SlimPlan, apply_plan
from mmitp.registry import MODELS

from . import dcn  # noqa: F401  registers the deformable convolution with the core
from .config_text import config_text, type_name

#: what to do where a slimmed network cannot get masks
FURTHER = (
    "to prune further, start from a checkpoint with masks (of a run with slim_at_end=False, from after its window), by "
    "that run's config with a lower target"
)


@MODELS.register_module()
def SlimModel(of: str, slim: dict[str, Any], **model: Any) -> nn.Module:  # noqa: N802  a registry type
    """Builds the model of type ``of`` in the slimmed structure ``slim``; its weights come with the checkpoint.

    Args:
        of: the original ``type``, with its scope.
        slim: :meth:`mmitp.pruning.SlimPlan.spec`.
        **model: the original model config.

    Raises:
        ValueError: the spec was made from another model.
    """
    built = ROOT_MODELS.build(dict(type=of, **model))
    return apply_plan(built, SlimPlan.from_spec(slim))


def is_type(node: Any, name: str) -> bool:
    """Whether a part of a config is of a class whose name ends so, be it ``'mmitp.X'``, a path or the class itself."""
    kind = node.get("type") if isinstance(node, Mapping) else None
    return kind is not None and type_name(kind).endswith(name)


def hooks_of(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of all hooks of a config; mmengine takes any hook among the default ones as well."""
    hooks = [*(cfg.get("custom_hooks") or []), *(cfg.get("default_hooks") or {}).values()]
    return [hook for hook in hooks if isinstance(hook, dict)]


def prune_hook_of(cfg: Mapping[str, Any]) -> Any:
    """A config's settings of PruneHook, or None."""
    return next((hook for hook in hooks_of(cfg) if is_type(hook, "PruneHook")), None)


def is_masked(model: Any) -> bool:
    """Whether a model's config is one of ``mmitp.MaskedModel``."""
    path = type_name(model.get("type")).split(".")
    return path[0] == "mmitp" and path[-1] == "MaskedModel"


def slim_config(cfg: Config, plan: SlimPlan, ending: str = "slim") -> Config:
    """The config of the slimmed network: the original's, without masks, pruning hook and pre-trained weights.

    Its work folder is another one than the original's, whose checkpoints training it would replace.

    Args:
        cfg: the config of the masked model.
        plan: what is left.
        ending: of the work folder's name.
    """
    out = copy.deepcopy(cfg)
    model = out.model
    if not is_masked(model):
        raise ValueError(f"expected a config whose model is of type 'mmitp.MaskedModel', got {model.type!r}")
    model.pop("prune", None)
    drop_pretrained(model)
    model.update(type="mmitp.SlimModel", of=type_name(model.of), slim=plan.spec())
    out.custom_hooks = [h for h in out.get("custom_hooks") or [] if not is_type(h, "PruneHook")]
    for name in [name for name, hook in (out.get("default_hooks") or {}).items() if is_type(hook, "PruneHook")]:
        del out.default_hooks[name]
    imports = dict(out.get("custom_imports") or {})
    names = imports.get("imports") or []
    names = [names] if isinstance(names, str) else list(names)
    if "mmitp" not in names:
        names.append("mmitp")
    out.custom_imports = dict(imports, imports=names)
    out.load_from = None
    out.resume = False
    if out.get("work_dir"):
        out.work_dir = f"{os.path.normpath(out.work_dir)}_{ending}"
    return out


def save_slim(small: nn.Module, plan: SlimPlan, cfg: Config, out_dir: str, meta: dict[str, Any]) -> tuple[str, str]:
    """Writes ``config.py`` and ``weights.pth`` (a plain state dict with meta) into a folder; returns both paths.

    Args:
        small: the slimmed model.
        plan: the plan it was made by.
        cfg: the config of the masked model.
        out_dir: folder to write.
        meta: the checkpoint's meta, ``dataset_meta`` included where inference needs class names.

    Raises:
        ValueError: the config holds what no file can say; nothing is written then.
    """
    config, weights = os.path.join(out_dir, "config.py"), os.path.join(out_dir, "weights.pth")
    text = config_text(slim_config(cfg, plan))
    write_whole(weights, saved_bytes(dict(meta=meta, state_dict=small.state_dict())))
    write_whole(config, text)
    return config, weights


def drop_pretrained(node: Any) -> None:
    """Takes the pre-trained weights out of a model's config, in place: ``init_cfg`` and the older ``pretrained``."""
    if isinstance(node, dict):
        init = node.get("init_cfg")
        if _is_pretrained(init):
            node["init_cfg"] = None
        elif isinstance(init, (list, tuple)):
            node["init_cfg"] = [part for part in init if not _is_pretrained(part)]
        if isinstance(node.get("pretrained"), str):
            node["pretrained"] = None
        elif node.get("pretrained") is True:  # timm's networks
            node["pretrained"] = False
        for child in node.values():
            drop_pretrained(child)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for child in node:
            drop_pretrained(child)


def _is_pretrained(init: Any) -> bool:
    return is_type(init, "Pretrained") or is_type(init, "PretrainedInit")  # the class has another name
