"""A control for a pruned config: the same network built narrower, at the same target."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine import Config
from torch import nn

from mmitp.engine.checkpoint import load_fitting, read_checkpoint, weights_of_checkpoint
from mmitp.engine.config import build_model, require_keys
from mmitp.engine.example import blank_example, second_example
from mmitp.engine.results import keep_inputs
from mmitp.engine.safe_load import saved_bytes
from mmitp.engine.slim_checkpoint import keep_foreign, sizes_text
from mmitp.files import write_whole
from mmitp.models.config_text import config_text
from mmitp.models.report import stated_shape
from mmitp.models.slim_config import drop_pretrained, is_masked, is_type, prune_hook_of, slim_config
from mmitp.pruning import MacBudget, freeze_masks
from mmitp.pruning.cost import make_cost
from mmitp.pruning.latency import LatencyCost
from mmitp.pruning.narrow import narrow_pattern, weight_norms
from mmitp.pruning.rng import kept_rng
from mmitp.pruning.slim import slim_with_plan
from mmitp.values import is_number


@dataclass
class NarrowReport:
    """What :func:`narrow_control` wrote.

    Attributes:
        config: path of the control's config.
        start: what it starts from, in words.
        shape: (H, W) that ``macs`` and ``macs_dense`` are stated for.
        shape_from: how the size is known, where nobody states it.
        macs_dense, macs: multiply-accumulates of the dense network and of the control.
        params_dense, params: their parameters.
    """

    config: str
    start: str
    shape: tuple[int, int]
    shape_from: str
    macs_dense: int
    macs: int
    params_dense: int
    params: int

    def text(self) -> str:
        sizes = sizes_text(self.shape, (self.macs_dense, self.macs), (self.params_dense, self.params))
        if self.shape_from:
            sizes += f"\n{self.shape[0]}x{self.shape[1]} is {self.shape_from}"
        return f"{sizes}\nit starts from {self.start}\n{self.config}"


def narrow_control(
    cfg: Config,
    out_dir: str,
    target: float | None = None,
    divisor: int | str | None = None,
    weights: str | None = None,
    scratch: bool = False,
    shape: Sequence[int] | None = None,
    trust: bool = False,
) -> NarrowReport:
    """Writes the config of a network in which every tensor is narrower by the same part, at a pruned config's target.

    That holds for what linear layers read, too, unless the config's ``model.prune`` says ``linear=False``. The control
    is trained by the same config without masks and PruneHook, and starts from the same weights: of those that the
    config loads (``load_from``, else pre-trained parts of the model) the channels with the largest L1 norms are cut
    out. Where it loads none the control starts from random ones too.

    Args:
        cfg: a pruned config, or a dense one with ``target``.
        out_dir: folder to write ``config.py`` and, where there are weights to start from, ``weights.pth`` into.
        target: part of the operations (or of the PruneHook's ``cost``) to keep; by default the PruneHook's.
        divisor: as the PruneHook's, and by default its.
        weights: checkpoint of the dense network to start from, in place of the config's ``load_from``.
        scratch: start from random weights, whatever the config loads.
        shape: (H, W) in pixels that operations are stated for; by default as for ``mmitp prune-report``.
        trust: also read a checkpoint that may run code.

    Raises:
        ValueError: no target is known; the config masks single weights, or is a slimmed network's; the weights cannot
            be read or do not fit; ``out_dir`` holds what must not be lost.
    """
    require_keys(cfg, ["model"], "to build narrower")
    pruning = prune_hook_of(cfg) or {}
    target = target if target is not None else pruning.get("target")
    if target is None:
        raise ValueError(f"{cfg.filename}: no PruneHook names a target: give --target, the part of operations to keep")
    if not (is_number(target) and 0 < target < 1):
        raise ValueError(f"{cfg.filename}: target must be a fraction of the operations in (0, 1), got {target!r}")
    assert not (weights and scratch)
    weights = None if scratch else weights or cfg.get("load_from")
    paths = [os.path.join(out_dir, name) for name in ("config.py", "weights.pth")]
    for path in paths:
        keep_inputs(path, cfg.filename, weights)
    keep_foreign(out_dir)
    cost = make_cost(pruning.get("cost", "macs"))
    if isinstance(cost, LatencyCost):
        raise ValueError(
            f"{cfg.filename}: its target is one of latency, and a control is built at a part of the operations: give "
            "--cfg-options with the PruneHook's cost='macs', and --target with what its pruned network kept"
        )
    masked, pretrained = _masked_config(cfg, keep_pretrained=weights is None and not scratch)
    model, example, more, size, shape_from = _built(masked, pretrained, shape)
    drawn = _load(model, weights, cfg.filename, trust) if weights is not None else []
    model.eval()
    budget = MacBudget(model, example, cost=cost, more_examples=more)
    starts = weights is not None or pretrained
    chosen = narrow_pattern(
        budget,
        target,
        divisor if divisor is not None else pruning.get("divisor", 1),
        weight_norms(budget) if starts else None,
    )
    freeze_masks(model, budget.split(chosen))
    small, plan = slim_with_plan(model, example, budget, more)
    control = slim_config(masked, plan, "control")
    meta = dict(
        macs_dense=budget.dense_macs, macs=budget.kept_macs(), input_shape=size, channels=example["inputs"].shape[1]
    )
    if starts:
        control.load_from = os.path.abspath(paths[1])
    text = config_text(control)
    if starts:
        state = {key: value for key, value in small.state_dict().items() if key not in drawn}
        write_whole(paths[1], saved_bytes(dict(meta=dict(mmitp=meta), state_dict=state)))
    write_whole(paths[0], text)
    source = weights if weights is not None else "the config's pre-trained weights"
    start = f"{paths[1]}: the channels of {source} with the largest L1 norms" if starts else "random weights"
    if drawn:
        start += (
            f". {', '.join(drawn[:3])}{', ...' if drawn[3:] else ''} do not fit and are random, as in the run itself"
        )
    return NarrowReport(
        paths[0],
        start,
        size,
        shape_from,
        budget.dense_macs,
        budget.kept_macs(),
        budget.dense_params,
        sum(p.numel() for p in small.parameters()),
    )


def _masked_config(cfg: Config, keep_pretrained: bool) -> tuple[Config, bool]:
    """The config with masks that all readers of a tensor share, and whether its model loads pre-trained weights."""
    out = copy.deepcopy(cfg)
    model = out.model
    if is_type(model, "SlimModel"):
        raise ValueError(
            f"{cfg.filename} is a slimmed network's config: give the one that it was trained with. (To train the "
            "slimmed structure from random weights, train this one.)"
        )
    if not is_masked(model):
        model.update(type="mmitp.MaskedModel", of=model.type)
    # Linear layers too, which would hold what they read at its full width; a config that says otherwise is obeyed.
    prune = {"linear": True, **(model.get("prune") or {}), "share": "stream"}
    if prune.get("granularity", "channel") != "channel":
        raise ValueError(
            f"{cfg.filename}: its masks are of granularity {prune['granularity']!r}, and a narrower network has fewer "
            "channels: give a config with masks on channels"
        )
    model.prune = prune
    before = copy.deepcopy(model.to_dict())
    plain = copy.deepcopy(before)
    drop_pretrained(plain)
    pretrained = keep_pretrained and plain != before
    if not pretrained:
        drop_pretrained(model)
    return out, pretrained


@kept_rng(seed=0)
def _built(
    cfg: Config, pretrained: bool, shape: Sequence[int] | None
) -> tuple[nn.Module, dict[str, Any], list[dict[str, Any]], tuple[int, int], str]:
    """The masked model, its example input, further ones, and the size of the first and how it is known."""
    model = build_model(cfg)
    if pretrained and hasattr(model, "init_weights"):
        model.init_weights()  # type: ignore[operator]
    size, shape_from = stated_shape(cfg, model, shape)
    example = blank_example(model, size)
    second = second_example(model, size, example["inputs"].shape[1])
    return model, example, [] if second is None else [second], size, shape_from


def _load(model: nn.Module, path: str, config: str | None, trust: bool) -> list[str]:
    """Loads what fits, as a run does with its ``load_from``: other data have other classes.

    Returns:
        What the run draws at random, since the checkpoint lacks it or has it in another shape.

    Raises:
        ValueError: the checkpoint has masks, or fits less than half of the network, or has layers that it lacks.
    """
    loaded = read_checkpoint(path, trust)
    state = weights_of_checkpoint(loaded, model)
    if any(key.endswith("prune_mask") for key in state):
        raise ValueError(
            f"{path} has masks: a pruned network is no start of a control. Give --weights with the dense network's, "
            "or --scratch"
        )
    own = model.state_dict()
    fitting = {key: value for key, value in state.items() if key not in own or value.shape == own[key].shape}
    misfit = model.load_state_dict(fitting, strict=False)
    drawn = [key for key in misfit.missing_keys if not key.endswith(("prune_mask", "prune_pattern"))]
    if misfit.unexpected_keys or 2 * len(drawn) > len(fitting):
        load_fitting(model, state, path, Path(config or "the config").name)
    return drawn
