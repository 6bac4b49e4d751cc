"""Missing data is found before networks are built: folders and files that a config's data sets and metrics name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine import Config

# mmpretrain's small sets fetch what is missing, unless told not to.
_FETCHING = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")


def check_data(cfg: Config, parts: Sequence[str]) -> None:
    """Looks for the folders and files that data sets and metrics name.

    Args:
        cfg: the config.
        parts: keys such as ``'train_dataloader'`` and ``'val_evaluator'``; what the config lacks or leaves empty is
            passed over, and so is data that does not lie in the file system.

    Raises:
        ValueError: a folder or file does not exist; says which, for what, and where data/README.md comes in.
    """
    for part in parts:
        for node in _readers(cfg.get(part)):
            for what, path in _paths(node):
                if "://" not in path and not os.path.exists(path):
                    raise ValueError(
                        f"{part}: no {what} {os.path.abspath(path)} ({node.get('type')}); data/README.md says where "
                        "KITTI, CIFAR-10 and ImageNet go, docs/prune.md how own data is named, and --cfg-options sets "
                        "another place"
                    )


def _readers(node: Any) -> Iterator[Mapping[str, Any]]:
    """Data sets, inside loaders and wrappers (repeated, concatenated, class-balanced ones), and metrics."""
    if isinstance(node, (list, tuple)):
        for inner in node:
            yield from _readers(inner)
    elif isinstance(node, Mapping):
        wrapped = [node[key] for key in ("dataset", "datasets", "metrics") if isinstance(node.get(key), (dict, list))]
        if wrapped:
            yield from _readers(wrapped)
        elif not node.get("backend_args") and not fetches(node):
            yield node


def fetches(node: Mapping[str, Any]) -> bool:
    """Whether a data set of a config downloads what is missing."""
    kind = node.get("type")
    name = kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name in _FETCHING and node.get("download", True)


def _paths(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    root = node.get("data_root") or ""
    prefixes = node.get("data_prefix") or {}
    named = [("folder", root), ("annotation file", node.get("ann_file")), ("folder", node.get("label_dir"))]
    named += [("folder", path) for path in (prefixes.values() if isinstance(prefixes, Mapping) else [prefixes])]
    for what, path in named:
        if isinstance(path, str) and path:
            yield what, path if path is root else os.path.join(root, path)
