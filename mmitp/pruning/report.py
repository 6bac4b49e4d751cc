"""What can be pruned of a masked model, what stays dense and why, as text."""

from __future__ import annotations

from .budget import MacBudget
from .graph import LayerRecord


def prunable_outputs(budget: MacBudget, record: LayerRecord) -> int:
    """How many output channels of a layer go once their readers drop them."""
    grouped = len(record.group_nodes) > 0
    nodes = record.group_nodes if grouped else record.out_nodes
    width = record.n_out // record.groups if grouped else 1
    return int((budget.needs.node_class[nodes] >= 0).sum()) * width


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
    if record.n_in <= 3:
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
