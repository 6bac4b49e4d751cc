"""What can be pruned of a masked model, what stays dense and why, as text; and the parameters it keeps."""

from __future__ import annotations

from torch import nn

from .budget import MacBudget
from .graph import LayerRecord
from .layers import masked_layers
from .slim import apply_plan, plan_slim
from .verify import copy_of


def prunable_outputs(budget: MacBudget, record: LayerRecord) -> int:
    """How many output channels of a layer go once their readers drop them."""
    nodes, width = record.output_nodes()
    return int((budget.needs.node_set[nodes] >= 0).sum()) * width


def dense_reason(budget: MacBudget, record: LayerRecord) -> str:
    """Why no input channel of a counted layer can be masked away; empty if one can."""
    if record.mask is not None and not record.note.startswith("its output is never read"):
        return ""
    if record.name in budget.unfollowed:
        return budget.unfollowed[record.name]
    if record.note:
        return record.note
    if record.groups > 1:
        return "grouped: no mask of its own, its groups go with their readers"
    if record.kind is not None and record.kind.linear:
        return "linear: masked only when asked for"
    weight = getattr(record.module, "weight", None)
    if weight is not None and not weight.requires_grad:
        return "frozen: its weight does not train"
    if record.reads_image:
        return "stem: reads the image"
    return "left out by include or exclude"


def report_text(budget: MacBudget) -> str:
    """Prunable layers, dense ones and why, barriers, dense MACs and the cheapest ratio."""
    rows = [(record, dense_reason(budget, record)) for record in budget.layers]
    width = max(len(record.name) for record in budget.layers)
    lines = [f"{'layer':{width}}  {'in':>5} {'out':>5} {'outputs that can go':>19} {'share of MACs':>13}"]

    def line(record: LayerRecord, text: str = "") -> str:
        share = record.dense_macs / budget.dense_macs
        counts = f"{record.n_in:5d} {record.n_out:5d} {prunable_outputs(budget, record):19d} {share:13.2%}"
        return f"{record.name:{width}}  {counts}  {text}".rstrip()

    lines += [line(record, record.note) for record, reason in rows if not reason]
    lines += ["", "no input channel can be masked away in:"]
    lines += [line(record, reason) for record, reason in rows if reason]
    counted = {record.name for record in budget.layers}
    if others := {name: reason for name, reason in budget.unfollowed.items() if name not in counted}:
        lines += ["", "read as a whole (what feeds them stays dense), or not run:"]
        lines += [f"{name or 'model'}: {reason}" for name, reason in others.items()]
    prunable = sum(record.dense_macs for record, reason in rows if not reason)
    lines += [
        "",
        f"layers that can be pruned: {sum(not reason for _, reason in rows)} of {len(rows)}, "
        f"{prunable / budget.dense_macs:.1%} of the operations",
        f"dense MACs: {budget.dense_macs:,} ({budget.dense_macs / 1e9:.3f} G)",
        f"cheapest reachable ratio: {budget.min_ratio():.4f}",
    ]
    return "\n".join(lines)


def parameter_counts(model: nn.Module, budget: MacBudget) -> tuple[int, int]:
    """Parameters of the dense network, and those kept under the masks' present patterns; masks are none of them.

    Channels: kept are the parameters that the slimmed network has. Single weights: slimming cannot take them out, and
    kept are those that are not masked to zero.

    Args:
        model: the model ``budget`` was recorded on.
        budget: its budget.
    """
    small = apply_plan(copy_of(model), plan_slim(model, budget))
    zeros = sum(
        int((layer.binary_mask() == 0).sum())
        for layer in masked_layers(model).values()
        if layer.mask_granularity == "weight"
    )
    return budget.dense_params, sum(p.numel() for p in small.parameters()) - zeros
