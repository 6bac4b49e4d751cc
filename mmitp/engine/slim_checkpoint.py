"""From a masked checkpoint to the slimmed network's config and weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from mmengine import Config

from mmitp.engine.checkpoint import known_input, load_fitting, not_final, read_checkpoint, weights_of_checkpoint
from mmitp.engine.config import build_model, require_keys
from mmitp.engine.example import blank_example, second_example
from mmitp.engine.hooks.prune_hook import STATE_KEY
from mmitp.engine.results import keep_inputs
from mmitp.models.slim_config import is_masked, save_slim
from mmitp.pruning import MacBudget, SlimPlan, apply_plan
from mmitp.pruning.masks import weights_of
from mmitp.pruning.progressive import restore_cut
from mmitp.pruning.slim import slim_with_plan


@dataclass
class SlimReport:
    """What :func:`slim_checkpoint` wrote."""

    config: str
    weights: str
    macs_dense: int
    macs_slim: int
    params_dense: int
    params_slim: int
    shape: tuple[int, int]
    warning: str = ""

    def text(self) -> str:
        macs, params = (self.macs_dense, self.macs_slim), (self.params_dense, self.params_slim)
        return f"{self.warning}{sizes_text(self.shape, macs, params)}\n{self.config}\n{self.weights}"


def sizes_text(shape: tuple[int, int], macs: tuple[int, int], params: tuple[int, int]) -> str:
    """Operations at (H, W) and parameters, of the dense network and of the small one each, in two lines."""
    return (
        f"MACs at {shape[0]}x{shape[1]}: {macs[0]:,} -> {macs[1]:,} ({macs[1] / macs[0]:.4f})\n"
        f"parameters: {params[0]:,} -> {params[1]:,} ({params[1] / params[0]:.4f})"
    )


def slim_checkpoint(
    cfg: Config, checkpoint: str, out_dir: str, shape: Sequence[int] | None = None, trust: bool = False
) -> SlimReport:
    """Slims a checkpoint trained with masks, or with ``slim_at_end``, and writes config and weights.

    The slimmed network is compared with the masked one at the given size, and at a second one where the model takes it.

    Args:
        cfg: the config it was trained with (model of type ``mmitp.MaskedModel``).
        checkpoint: its path.
        out_dir: folder to write ``config.py`` and ``weights.pth`` into.
        shape: (H, W) the MACs are stated for; by default that of the training's budget.
        trust: also read a checkpoint that may run code.

    Raises:
        ValueError: the config builds no masked model; the checkpoint cannot be read, holds no masks or does not fit; no
            shape is known; ``out_dir`` holds what must not be lost: a file given here, another network's.
    """
    for name in ("config.py", "weights.pth"):
        keep_inputs(os.path.join(out_dir, name), cfg.filename, checkpoint)
    keep_foreign(out_dir)
    require_keys(cfg, ["model"], "to slim")
    if not is_masked(cfg.model):
        raise ValueError(f"{cfg.filename}: the model is {cfg.model.get('type')!r}, not 'mmitp.MaskedModel'")
    loaded = read_checkpoint(checkpoint, trust)
    known = loaded.get(STATE_KEY, {})
    if not known.get("slimmed") and not any(key.endswith("prune_mask") for key in loaded.get("state_dict", loaded)):
        raise ValueError(f"{checkpoint} holds no masks (no 'prune_mask' key): it was trained without pruning")
    trained, channels = known_input(loaded)
    size = (int(shape[0]), int(shape[1])) if shape else trained
    if size is None:
        raise ValueError(f"{checkpoint} does not say which input size its budget was for: give --shape H W")
    model = build_model(cfg)
    state = weights_of_checkpoint(loaded, model)
    warning = ""
    dense = sum(p.numel() for _, p in weights_of(model))
    if slimmed := known.get("slimmed"):  # slim_at_end has done it already
        if size != trained:
            raise ValueError(
                f"{checkpoint} is slimmed already; its MACs are known at {trained} only, leave --shape out"
            )
        plan = SlimPlan.from_spec(slimmed["spec"])
        small = apply_plan(model, plan)
        load_fitting(small, state, checkpoint, cfg.filename)
        macs_dense, macs = slimmed["macs_dense"], slimmed["macs_kept"]
    else:
        cut = known.get("pruner", {}).get("cut")  # progressive slimming: the weights fit the dense network no more
        if cut is None:
            load_fitting(model, state, checkpoint, cfg.filename)
        model.eval()
        example = blank_example(model, size, channels)
        channels = example["inputs"].shape[1]
        second = second_example(model, size, channels)
        more = [] if second is None or cut is not None else [second]
        budget = MacBudget(model, example, more_examples=more)
        if cut is not None:
            apply_plan(model, restore_cut(model, budget, cut), keep_masks=True)
            load_fitting(model, state, checkpoint, cfg.filename)
        warning = not_final(model, checkpoint)
        small, plan = slim_with_plan(model, example, budget, more)
        macs_dense, macs = budget.dense_macs, budget.kept_macs()
    meta = dict(
        loaded.get("meta", {}), mmitp=dict(macs_dense=macs_dense, macs=macs, input_shape=size, channels=channels)
    )
    meta.pop("cfg", None)
    config, weights = save_slim(small, plan, cfg, out_dir, meta)
    return SlimReport(
        config,
        weights,
        macs_dense,
        macs,
        dense,
        sum(p.numel() for p in small.parameters()),
        size,
        warning,
    )


def keep_foreign(folder: str) -> None:
    """Refuses to write ``config.py`` and ``weights.pth`` over files of somebody else's.

    They may be all there is of a run. A slimmed network's config says that both are ours; weights that a stopped
    writer left without one say it by their ``meta.mmitp``.

    Raises:
        ValueError: with the file.
    """
    config, weights = os.path.join(folder, "config.py"), os.path.join(folder, "weights.pth")
    if os.path.isfile(config):
        with open(config, encoding="utf-8", errors="replace") as file:
            ours = "SlimModel" in file.read()
        found = config
    elif os.path.isfile(weights):
        try:
            ours = bool(read_checkpoint(weights).get("meta", {}).get("mmitp"))
        except ValueError:  # whatever it is, not ours
            ours = False
        found = weights
    else:
        return
    if not ours:
        raise ValueError(f"{found} exists and is no slimmed network's: give another folder to write to")
