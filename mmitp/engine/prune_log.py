"""What PruneHook tells of a run: what the optimizer does to the masks, and what the freeze made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from logging import Logger

import torch
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from mmitp.files import write_whole
from mmitp.pruning import FreezeReport, LayerRow, MaskedLayer


def tell_groups(masks: Mapping[str, MaskedLayer], optimizer: torch.optim.Optimizer, logger: Logger) -> None:
    """Learning rate and weight decay of the masks: a config's parameter-wise options can change them unseen."""
    ids = {id(layer.prune_mask) for layer in masks.values()}
    seen: dict[tuple[float, float, str], int] = {}
    for group in optimizer.param_groups:
        if count := sum(id(p) in ids for p in group["params"]):
            decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
            kind = "decoupled" if decoupled else "L2"
            key = (float(group["lr"]), float(group.get("weight_decay", 0.0)), kind)
            seen[key] = seen.get(key, 0) + count
    for (lr, decay, kind), count in seen.items():
        logger.info(
            f"PruneHook: {count} masks in {type(optimizer).__name__} with lr {lr:g}, {kind} weight decay {decay:g}"
        )


def tell_ratio(report: FreezeReport, logger: Logger) -> None:
    """The part of the cost that the frozen masks keep, and what it took to get there."""
    logger.info(
        f"PruneHook: masks frozen at {report.ratio:.4f} of the {report.cost} ({report.cost_kept} of "
        f"{report.cost_dense} {report.unit}; {report.ratio_before:.4f} before), target {report.target}: "
        f"{report.switched_off} masks switched off to meet it, {report.switched_on} switched on to fill it"
    )


def tell_freeze(report: FreezeReport, runner: Runner, done: int, logger: Logger) -> None:
    """The frozen network in the log, on the visualizer (at step ``done``), and as ``<work_dir>/pruning.json``."""
    how = (
        "single weights: the operations are multiplications by those not masked to zero, and slimming keeps zeros"
        if report.granularity == "weight"
        else "as the slimmed network has them"
    )
    part = report.params_kept / report.params_dense
    logger.info(f"PruneHook: {report.params_kept} of {report.params_dense} parameters kept ({part:.4f}), {how}")
    logger.info("PruneHook: channels kept by layer\n" + layer_table(report.layers))
    if hasattr(runner, "visualizer"):
        kept = {f"channels_kept/{row.name}": row.in_kept / row.in_channels for row in report.layers}
        runner.visualizer.add_scalars(kept, step=done)
    if is_main_process():
        write_whole(os.path.join(runner.work_dir, "pruning.json"), json.dumps(report.to_dict(), indent=1))


def layer_table(rows: Sequence[LayerRow]) -> str:
    """The budget's rows as aligned text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'layer':<{width}}  {'in':>11}  {'out':>11}  {'MMACs dense':>12}  {'kept':>10}"]
    for r in rows:
        lines.append(
            f"{r.name:<{width}}  {f'{r.in_kept}/{r.in_channels}':>11}  {f'{r.out_kept}/{r.out_channels}':>11}  "
            f"{r.macs_dense / 1e6:>12.2f}  {r.macs_kept / 1e6:>10.2f}  {r.note}".rstrip()
        )
    return "\n".join(lines)
