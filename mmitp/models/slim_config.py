"""Slimmed networks as config and weights: the builder that gives a dense model the structure of a spec."""

from __future__ import annotations

import copy
import keyword
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmengine import Config
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from mmitp.engine.safe_load import saved_bytes
from mmitp.files import write_whole
from mmitp.pruning import SlimPlan, apply_plan
from mmitp.registry import MODELS

from . import dcn  # noqa: F401  registers the deformable convolution with the core

#: columns up to which a dict or list of a written config stands in one line
_WIDTH = 100


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


def type_name(kind: Any) -> str:
    """A config's ``type`` as a string; configs of mmengine's newer style hold the class itself."""
    return f"{kind.__module__}.{kind.__qualname__}" if hasattr(kind, "__qualname__") else str(kind)


def is_type(node: Any, name: str) -> bool:
    """Whether a part of a config is of a class whose name ends so, be it ``'mmitp.X'``, a path or the class itself."""
    kind = node.get("type") if isinstance(node, Mapping) else None
    return kind is not None and type_name(kind).endswith(name)


def prune_hook_of(cfg: Mapping[str, Any]) -> Any:
    """A config's settings of PruneHook, or None; mmengine takes it among the default hooks as well."""
    hooks = [*(cfg.get("custom_hooks") or []), *(cfg.get("default_hooks") or {}).values()]
    return next((hook for hook in hooks if is_type(hook, "PruneHook")), None)


def is_masked(model: Any) -> bool:
    """Whether a model's config is one of ``mmitp.MaskedModel``."""
    path = type_name(model.get("type")).split(".")
    return path[0] == "mmitp" and path[-1] == "MaskedModel"


def slim_config(cfg: Config, plan: SlimPlan) -> Config:
    """The config of the slimmed network: the original's, without masks, pruning hook and pre-trained weights."""
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
        ValueError: the config holds what no file can say (see :func:`config_text`); nothing is written then.
    """
    config, weights = os.path.join(out_dir, "config.py"), os.path.join(out_dir, "weights.pth")
    text = config_text(slim_config(cfg, plan))
    write_whole(weights, saved_bytes(dict(meta=meta, state_dict=small.state_dict())))
    write_whole(config, text)
    return config, weights


def config_text(cfg: Config) -> str:
    """A config as the text of a file that reads as the same config.

    mmengine's ``pretty_text`` is not for all: infinities, paths and classes stand there as names that nobody defines.

    Raises:
        ValueError: a value that no text stands for (a tensor, a function), with its key.
    """
    return "".join(f"{key} = {_written(value, str(key))}\n" for key, value in cfg.to_dict().items())


def _written(value: Any, where: str, indent: str = "") -> str:
    """A value as it stands in a config file, in one line where it is short."""
    if isinstance(value, Mapping):
        by_name = all(isinstance(k, str) and k.isidentifier() and not keyword.iskeyword(k) for k in value)
        inner = [(k if by_name else repr(k), _written(v, f"{where}.{k}", indent + "    ")) for k, v in value.items()]
        brackets, link = (("dict(", ")"), "=") if by_name else (("{", "}"), ": ")
        parts = [f"{k}{link}{v}" for k, v in inner]
    elif isinstance(value, (list, tuple)):
        brackets = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
        parts = [_written(item, f"{where}.{i}", indent + "    ") for i, item in enumerate(value)]
    else:
        return _scalar(value, where)
    line = brackets[0] + ", ".join(parts) + brackets[1]
    if len(indent) + len(line) <= _WIDTH and "\n" not in line:
        return line
    lines = "".join(f"\n{indent}    {part}," for part in parts)
    return f"{brackets[0]}{lines}\n{indent}{brackets[1].lstrip(',')}"


def _scalar(value: Any, where: str) -> str:
    if isinstance(value, float):  # NumPy's too, whose own text differs
        return float.__repr__(value) if math.isfinite(value) else f"float('{float(value)}')"
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if hasattr(value, "__qualname__"):  # a registry takes a class or function by its path
        if getattr(value, "__module__", None) == "builtins":
            return value.__name__
        if where.endswith((".type", ".of")):
            return repr(type_name(value))
    if value is None or isinstance(value, (bool, int, str, bytes, complex, range, slice, set, frozenset)):
        return repr(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    shown = " ".join(repr(value).split())
    shown = shown[:77] + "..." if len(shown) > 80 else shown
    raise ValueError(
        f"the config cannot be written to a file: {where} is {shown} ({type(value).__name__}), which no text of a "
        "config stands for. Give it as a number, a name, or a list of them"
    )


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
