"""Measures the table that a :class:`~mmitp.pruning.latency.LatencyCost` interpolates.

Every layer is timed by itself, cut to a grid of channel numbers just as slimming cuts it, with its gather and scatter
where slimmed networks have them. Whole slimmed networks are timed too: what they take beyond their layers (norms,
activations, additions, the framework) is fitted as a constant and a part in proportion to the channels computed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import MacBudget
from ..graph import LayerRecord
from ..needs import channel_masked
from ..rng import kept_rng
from ..slim import LayerPlan, shrink_layer
from ..verify import call_model, copy_of
from .fit import fit_remainder
from .networks import sample_patterns, slimmed_to
from .table import TABLE_FORMAT
from .timing import clock_of, least_times, processor, torch_threads

#: Whole networks are timed in turn for about so long, but no more than 100 times and no less than a layer.
_NETWORKS_NS = 30e9


@dataclass
class _Seen:
    """What a layer was given in the recorded pass, and how many positions a channel of its outputs has."""

    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    positions: int = 0


@kept_rng()
def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    threads: int | None = None,
    rounds: int = 12,
    networks: int = 6,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The latency table of a masked model, JSON-able.

    With one thread on the CPU it is the thread's processor time that counts, so that other processes disturb it less;
    else wall time. All figures are nanoseconds, the least of several rounds.

    Args:
        model: masked model; it is copied.
        example_inputs: as for :class:`MacBudget`, of the size and batch to measure.
        threads: of torch; by default its present number.
        rounds: timings of every point; networks are timed more often.
        networks: slimmed networks that the remainder is fitted on; two more are held out to tell the table's error.
        report: receives lines about the progress.

    Raises:
        ValueError: no mask counts in the model.
    """
    model = copy_of(model).eval()
    budget = MacBudget(model, example_inputs)
    if not budget.masked:
        raise ValueError(f"{type(model).__name__} has no mask that counts: there is nothing a table could predict")
    device = next(model.parameters()).device
    with torch_threads(threads), torch.no_grad():
        clock = clock_of(device)
        patterns = sample_patterns(budget, networks + 2)
        slimmed, plans = zip(*(slimmed_to(model, example_inputs, budget, p) for p in patterns), strict=True)
        dense, half = slimmed[0], plans[1]
        seen = _record(dense, budget, example_inputs)
        names = {module: name for name, module in model.named_modules()}
        entries: dict[str, dict[str, Any]] = {}
        known: dict[Any, dict[str, Any]] = {}
        modules = dict(dense.named_modules())
        for index, record in enumerate(budget.layers):
            if record.module is None:
                continue
            name = names[record.module]
            layer = modules[name]
            gather, scatter = half.layers[name].in_index is not None, half.layers[name].out_index is not None
            shapes = [(tuple(x.shape), x.stride()) for x, _, _ in seen[record.name].calls]
            key = (repr(layer), str(shapes), gather, scatter, _axes(budget, index))
            if key not in known:
                known[key] = _measure_layer(
                    layer, record, _axes(budget, index), seen[record.name], gather, scatter, clock, rounds
                )
                report(f"{name}: {max(map(max, known[key]['ns'])) / 1e6:.3f} ms dense")
            entries[record.name] = dict(
                known[key], n_in=record.n_in, n_out=record.n_out, pair_macs=record.pair_macs, element=0.0
            )
        calls = [lambda m=m: call_model(m, example_inputs) for m in slimmed]
        times = least_times(calls, clock, 3)
        times = least_times(calls, clock, max(rounds, min(100, int(_NETWORKS_NS / sum(times)))))
    positions = {
        r.name: 0 if entries[r.name]["scatter"] else seen[r.name].positions for r in budget.layers if r.name in entries
    }
    table = dict(
        format=TABLE_FORMAT,
        machine=processor(device),
        device=str(device),
        threads=threads or torch.get_num_threads(),
        constant=0.0,
        layers=entries,
    )
    return fit_remainder(table, positions, budget, model, patterns, times, networks)


def _record(dense: nn.Module, budget: MacBudget, example_inputs: Any) -> dict[str, _Seen]:
    modules, handles = dict(dense.named_modules()), []
    seen: dict[str, _Seen] = {}
    for record in budget.layers:
        if record.module is None or record.kind is None:
            continue
        seen[record.name] = _Seen()
        dim = -1 if record.kind.linear else -3

        def note(
            module: nn.Module, args: Any, kwargs: Any, out: Tensor, to: _Seen = seen[record.name], dim: int = dim
        ) -> None:
            kwargs = dict(kwargs)
            x, *rest = args or (kwargs.pop(next(iter(kwargs))),)
            to.calls.append((x, tuple(rest), kwargs))
            to.positions += out.numel() // out.shape[dim]

        handles.append(modules[record.name].register_forward_hook(note, with_kwargs=True))
    call_model(dense, example_inputs)
    for handle in handles:
        handle.remove()
    return seen


def _axes(budget: MacBudget, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The channel numbers a layer is measured at: those it can get to."""
    record = budget.layers[index]
    assert record.kind is not None
    masked = budget.needs.layer_entries[index] is not None
    if record.kind.whole(record.module) or masked and not channel_masked(record):
        return (record.n_in // record.groups,), (record.n_out,)
    if record.groups > 1:
        width = record.n_out // record.groups
        return (record.n_in // record.groups,), tuple(width * g for g in _points(record.groups))
    return _points(record.n_in) if masked else (record.n_in,), _points(record.n_out)


def _points(n: int) -> tuple[int, ...]:
    """Channel numbers up to n, all but n beside the multiples of 8 that kernels prefer: pruning ends anywhere."""
    points = {1, n, max(n - 3, 1)}
    for eighths in (1, 2, 4, 6):
        p = max(n * eighths // 8, 1)
        points.add(p - min(3, p // 8) if p % 8 == 0 else p)
    return tuple(sorted(points))


def _measure_layer(
    layer: nn.Module,
    record: LayerRecord,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    seen: _Seen,
    gather: bool,
    scatter: bool,
    clock: Callable[[], int],
    rounds: int,
) -> dict[str, Any]:
    inputs, outputs = axes

    def timed(n_in: int, n_out: int, gather: bool, scatter: bool) -> Callable[[], None]:
        small, arguments = _cut(layer, record, seen, n_in, n_out, gather, scatter)

        def run() -> None:
            for x, args, kwargs in arguments:
                small(x, *args, **kwargs)

        return run

    calls = [timed(i, o, gather, scatter) for i, o in itertools.product(inputs, outputs)]
    plain = [(False, scatter), (gather, False)]
    calls += [timed(inputs[-1], outputs[-1], *kind) for kind in plain]
    *times, no_gather, no_scatter = least_times(calls, clock, rounds)
    grid = torch.tensor(times, dtype=torch.float64).view(len(inputs), len(outputs))
    # More channels never take less, but for noise and for a kernel's preferences that no mask can aim at.
    grid = grid.cummax(0).values.cummax(1).values
    return dict(
        inputs=list(inputs),
        outputs=list(outputs),
        ns=grid.tolist(),
        gather=max(times[-1] - no_gather, 0.0) if gather else 0.0,
        scatter=max(times[-1] - no_scatter, 0.0) if scatter else 0.0,
    )


def _cut(
    layer: nn.Module, record: LayerRecord, seen: _Seen, n_in: int, n_out: int, gather: bool, scatter: bool
) -> tuple[nn.Module, list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]]:
    """The layer with so many channels, and what to call it with."""
    assert record.kind is not None
    small = copy.deepcopy(layer)
    reads = n_out * record.n_in // record.n_out if record.groups > 1 else n_in
    if record.kind.whole(layer) or (reads, n_out) == (record.n_in, record.n_out) and not gather and not scatter:
        return small, seen.calls
    spread_in = _spread_over(reads, record.n_in) if gather else None
    spread_out = _spread_over(n_out, record.n_out) if scatter else None
    plan = LayerPlan(
        torch.arange(reads), torch.arange(n_out), spread_in, spread_out, record.n_out if scatter else n_out
    )
    shrink_layer(small, record.kind, plan)
    dim = -1 if record.kind.linear else -3
    arguments = []
    for x, args, kwargs in seen.calls:
        if not gather:
            dense = x.is_contiguous()
            x = x.narrow(dim, 0, reads)
            last = not dense and x.dim() == 4
            x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        arguments.append((x, args, kwargs))
    return small, arguments


def _spread_over(n: int, total: int) -> Tensor:
    return torch.linspace(0, total - 1, n).round().long()
