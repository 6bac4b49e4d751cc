"""Measures the latency table that :class:`mmitp.pruning.cost.LatencyCost` interpolates.

Every layer is timed by itself, cut to a grid of channel numbers just as slimming cuts it, with its gather and scatter
where slimmed networks have them. Whole slimmed networks are timed too: what they take beyond their layers (norms,
activations, additions, the framework) is fitted as a constant and a part in proportion to the channels computed.
"""

from __future__ import annotations

import copy
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .budget import MacBudget
from .cost import LatencyCost
from .graph import LayerRecord
from .latency_table import TABLE_FORMAT
from .layers import masked_layers
from .needs import channel_masked
from .rng import kept_rng
from .slim import LayerPlan, SlimPlan, shrink_layer, slim_with_plan
from .verify import call_model, eval_mode, frozen_at

#: A single timing takes at least this long; shorter calls are repeated within it.
_LEAST_NS = 300_000

#: Whole networks are timed in turn for about so long, but no more than 100 times and no less than a layer.
_NETWORKS_NS = 30e9

#: :func:`clock_ratio` times its two networks for about so long, 3 to 100 times.
_CLOCK_NS = 3e9


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
    model = copy.deepcopy(model).eval()
    budget = MacBudget(model, example_inputs)
    if not budget.masked:
        raise ValueError(f"{type(model).__name__} has no mask that counts: there is nothing a table could predict")
    device = next(model.parameters()).device
    with _threads(threads), torch.no_grad():
        clock = _clock(device)
        patterns = _patterns(budget, networks + 2)
        slimmed, plans = zip(*(_slimmed(model, example_inputs, budget, p) for p in patterns), strict=True)
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
        times = _least(calls, clock, 3)
        times = _least(calls, clock, max(rounds, min(100, int(_NETWORKS_NS / sum(times)))))
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
    return _fit(table, positions, budget, model, patterns, times, networks)


def time_in_turn(
    model: nn.Module, example_inputs: Any, budget: MacBudget, patterns: Sequence[Tensor], rounds: int | None = None
) -> Tensor:
    """Times of slimmed networks, ``(rounds, patterns)`` in ns, on the table's device and with its threads.

    The model stays as it is, and so does the state of random numbers.

    Args:
        model: the masked model the budget was made of.
        example_inputs: of the size and batch the table was measured with, on the model's device.
        budget: a budget with a :class:`LatencyCost`.
        patterns: flat bool patterns.
        rounds: timings of every network; None for as many as take some seconds.
    """
    cost = budget.cost
    assert isinstance(cost, LatencyCost)
    device = torch.device(cost.table.get("device", "cpu"))
    with torch.no_grad(), kept_rng():
        networks = [_slimmed(model, example_inputs, budget, p)[0].to(device) for p in patterns]
        inputs = _moved(example_inputs, device)
        calls = [lambda m=m: call_model(m, inputs) for m in networks]
        with _threads(cost.table.get("threads")):
            clock = _clock(device)
            if rounds is None:
                rounds = max(3, min(100, int(_CLOCK_NS / float(_rounds(calls, clock, 1).sum()))))
            return _rounds(calls, clock, rounds)


def clock_ratio(model: nn.Module, example_inputs: Any, budget: MacBudget, pattern: Tensor) -> float:
    """Measured latency of the network slimmed to a pattern, as part of the dense one's.

    The median over rounds of the ratio of two times taken one right after the other. On a busy machine, where quiet
    moments are rare, the ratio of the least times scatters several times as much. Arguments: :func:`time_in_turn`.
    """
    dense = torch.ones(budget.n_literals, dtype=torch.bool)
    times = time_in_turn(model, example_inputs, budget, [dense, pattern])
    return float((times[:, 1] / times[:, 0]).quantile(0.5))


def paired_times(
    models: Sequence[nn.Module], example_inputs: Any, threads: int = 1, rounds: int | None = None
) -> Tensor:
    """Times of one evaluation pass of several networks, ``(rounds, models)`` in ns, one after the other in each round.

    With one thread on the CPU it is processor time that counts. Ratios within a round are steadier than the times
    themselves: what else runs on the machine weighs on all of a round alike.

    Args:
        models: networks that take the same input; their mode and the state of random numbers stay.
        example_inputs: as for :class:`MacBudget`.
        threads: of torch.
        rounds: timings of every network; None for as many as take some seconds.
    """
    device = next((p.device for model in models for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), kept_rng(), _threads(threads), ExitStack() as modes:
        for model in models:
            modes.enter_context(eval_mode(model))
        calls = [lambda m=m: call_model(m, example_inputs) for m in models]
        clock = _clock(device)
        if rounds is None:
            rounds = max(3, min(100, int(_CLOCK_NS / float(_rounds(calls, clock, 1).sum()))))
        return _rounds(calls, clock, rounds)


def processor(device: torch.device | str) -> str:
    """What a device is called, to tell whose times a table holds; empty for a device this machine does not have."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _moved(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, dict):
        return {key: _moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_moved(value, device) for value in inputs)
    return inputs.to(device) if hasattr(inputs, "to") else inputs


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _clock(device: torch.device) -> Callable[[], int]:
    if device.type == "cuda":

        def synchronized() -> int:
            torch.cuda.synchronize(device)
            return time.perf_counter_ns()

        return synchronized
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns


def _least(calls: Sequence[Callable[[], Any]], clock: Callable[[], int], rounds: int) -> list[float]:
    """Least time of each call in ns."""
    return _rounds(calls, clock, rounds).amin(0).tolist()


def _rounds(calls: Sequence[Callable[[], Any]], clock: Callable[[], int], rounds: int) -> Tensor:
    """Times in ns, ``(rounds, calls)``: the calls take turns, so that slow moments of the machine hit all alike."""
    repeats = []
    for call in calls:
        call()
        start = clock()
        call()
        repeats.append(max(1, round(_LEAST_NS / max(clock() - start, 1))))
    times = torch.empty(rounds, len(calls), dtype=torch.float64)
    for row in times:
        for i, (call, n) in enumerate(zip(calls, repeats, strict=True)):
            start = clock()
            for _ in range(n):
                call()
            row[i] = (clock() - start) / n
    return times


def _patterns(budget: MacBudget, count: int) -> list[Tensor]:
    """All on, half on, and patterns whose layers keep different parts."""
    generator = torch.Generator().manual_seed(0)
    rows = budget.tables(torch.device("cpu")).literal_row
    patterns = [torch.ones(budget.n_literals, dtype=torch.bool)]
    for i in range(count - 1):
        low = 0.5 if i == 0 else 0.15 + 0.6 * ((i - 1) % 3) / 2
        keep = low + (0.0 if i == 0 else 0.25) * torch.rand(len(budget.layers), generator=generator)
        patterns.append(budget.binarize(keep[rows] - torch.rand(budget.n_literals, generator=generator)))
    return patterns


def _slimmed(model: nn.Module, example_inputs: Any, budget: MacBudget, pattern: Tensor) -> tuple[nn.Module, SlimPlan]:
    with frozen_at(budget.patterns(pattern)):
        small, plan = slim_with_plan(model, example_inputs, budget)
    assert not masked_layers(small)
    return small.eval(), plan


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
    masked = budget.needs.literal_start[index] >= 0
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
    *times, no_gather, no_scatter = _least(calls, clock, rounds)
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


def _fit(
    table: dict[str, Any],
    positions: dict[str, int],
    budget: MacBudget,
    model: nn.Module,
    patterns: Sequence[Tensor],
    times: Sequence[float],
    networks: int,
) -> dict[str, Any]:
    """Fits whole networks by scale * layers + elements * (positions times channels) + constant, none negative."""
    tables = budget.tables(torch.device("cpu"))

    def totals(layers: dict[str, Any]) -> Tensor:
        cost = LatencyCost(dict(table, layers=layers), margin=0)
        cost.bind(budget, model)
        return torch.tensor([cost.total(tables, p.double()) for p in patterns], dtype=torch.float64)

    nothing = dict(gather=0.0, scatter=0.0)
    elements = {
        name: dict(e, **nothing, ns=[[0.0] * len(e["outputs"])] * len(e["inputs"]), element=float(positions[name]))
        for name, e in table["layers"].items()
    }
    measured = torch.tensor(times, dtype=torch.float64)
    features = torch.stack([totals(table["layers"]), totals(elements), torch.ones(len(times))], 1).double()
    # Relative errors; the dense network, of which a target is a fraction, counts as much as all others.
    weight = torch.ones(networks, dtype=torch.float64)
    weight[0] = (networks - 1) ** 0.5
    rows = features[:networks] / measured[:networks, None] * weight[:, None]
    scale, element, constant = _nonnegative(rows, weight).tolist()
    for name, entry in table["layers"].items():
        entry["ns"] = [[scale * v for v in line] for line in entry["ns"]]
        entry["gather"], entry["scatter"] = scale * entry["gather"], scale * entry["scatter"]
        entry["element"] = element * positions[name]
    table["constant"] = constant
    predicted = features @ torch.tensor([scale, element, constant], dtype=torch.float64)
    table["fit"] = dict(scale=scale, element=element, constant=constant)
    table["networks"] = [
        dict(ratio=budget.macs_of(p) / budget.dense_macs, measured=t, predicted=float(q), fitted=i < networks)
        for i, (p, t, q) in enumerate(zip(patterns, times, predicted, strict=True))
    ]
    return table


def _nonnegative(a: Tensor, b: Tensor) -> Tensor:
    """Least squares with no negative unknown, by trying every set of unknowns (there are few)."""
    best, error = torch.zeros(a.shape[1], dtype=a.dtype), float(b.square().sum())
    for size in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), size):
            x = torch.linalg.lstsq(a[:, chosen], b[:, None], driver="gelsd").solution[:, 0]
            left = float((a[:, chosen] @ x - b).square().sum())
            if bool((x >= 0).all()) and left < error:
                best, error = torch.zeros_like(best), left
                best[list(chosen)] = x
    return best
