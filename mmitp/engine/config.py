"""Configs from files, from the OpenMMLab packages, and from the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmengine import Config
from mmengine.config import DictAction
from mmengine.hub import get_config


def load_config(source: str, options: Sequence[str] = (), work_dir: str | None = None) -> Config:
    """Reads a config.

    Args:
        source: path of a file, or ``'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'`` and the like.
        options: overrides, ``'a.b=value'``.
        work_dir: overrides the config's; by default ``work_dirs/<config name>``.

    Raises:
        ValueError: there is no such config, or an option is not of the form ``key=value``.
    """
    if "::" in source:
        package, name = source.split("::", 1)
        try:
            cfg = get_config(f"{package}::{name if name.endswith('.py') else name + '.py'}", pretrained=False)
        except FileNotFoundError as error:
            raise ValueError(f"{package} has no config {name!r}") from error
    elif os.path.isfile(source):
        cfg = Config.fromfile(source)
    else:
        raise ValueError(f"no config file {source!r} (a packaged one is named like 'mmdet::folder/name.py')")
    overrides: dict[str, Any] = {}
    for option in options:
        key, sep, value = option.partition("=")
        if not sep:
            raise ValueError(f"--cfg-options takes key=value, got {option!r}")
        overrides[key] = DictAction._parse_iterable(value)
    cfg.merge_from_dict(overrides)
    name = os.path.splitext(os.path.basename(source.split("::")[-1]))[0]
    cfg.work_dir = work_dir or cfg.get("work_dir") or os.path.join("work_dirs", name)
    return cfg
