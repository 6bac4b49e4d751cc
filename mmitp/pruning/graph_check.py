"""The check that the channel graph tells the truth: what a pattern drops is perturbed, and no output may move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .graph import LayerRecord
from .layers import Conv2dKind
from .masks import MaskedLayer, weights_of
from .verify import compare, frozen_at, outputs, tensors_in

#: A parameter below this everywhere may hide what it multiplies: layers that training starts at zero or close to it
#: (``zero_init_residual``, LayerScale's 1e-6, new branches).
CLOSED = 1e-2


@torch.no_grad()
def layers_that_move(
    model: nn.Module,
    examples: Sequence[Any],
    layers: Sequence[LayerRecord],
    patterns: Mapping[MaskedLayer, Tensor],
    needed: Tensor,
) -> list[int]:
    """The layers (by index) whose dropped channels an output depends on, though no reader of them is known.

    Args:
        model: the masked model.
        examples: inputs of forward passes.
        layers: as recorded; the first example's passes note where a layer's work depends on the data.
        patterns: of every mask that counts.
        needed: ``(n_nodes,)`` bool, the channels that these patterns need.
    """
    candidates = [i for i, r in enumerate(layers) if r.module is not None and not bool(needed[r.out_nodes].all())]
    moved: set[int] = set()
    with frozen_at(patterns), opened(model):
        for number, example in enumerate(examples):
            still = _outputs_and_work(model, example, layers) if number == 0 else outputs(model, example)
            if _moves(model, example, layers, candidates, needed, still):
                each = [i for i in candidates if _moves(model, example, layers, [i], needed, still)]
                moved.update(each or candidates)
    return sorted(moved)


def _outputs_and_work(model: nn.Module, example_inputs: Any, layers: Sequence[LayerRecord]) -> dict[str, Tensor]:
    """The outputs; names the layers whose work changed with the pattern, as it does after proposals."""
    work: dict[int, int] = {}
    with ExitStack() as hooks:
        for i, record in enumerate(layers):
            if record.module is None or record.kind is None:
                continue

            def count(
                module: nn.Module, args: Any, kwargs: Any, out: Tensor, i: int = i, kind: Conv2dKind = record.kind
            ) -> None:
                x = next(tensors_in((args, kwargs)))
                work[i] = work.get(i, 0) + kind.pair_macs(module, x, out)

            hooks.enter_context(record.module.register_forward_hook(count, with_kwargs=True))
        still = outputs(model, example_inputs)
    for i, macs in work.items():
        if macs != layers[i].pair_macs:
            layers[i].note = "its work depends on the data: the recorded pass's MACs stand"
    return still


def _moves(
    model: nn.Module,
    example_inputs: Any,
    layers: Sequence[LayerRecord],
    rows: list[int],
    needed: Tensor,
    still: dict[str, Tensor],
) -> bool:
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with ExitStack() as hooks:
        for i in rows:
            record = layers[i]
            assert record.module is not None
            assert record.kind is not None
            drop = ~needed[record.out_nodes]
            dim = -1 if record.kind.linear else -3

            def add_noise(module: nn.Module, args: Any, out: Tensor, drop: Tensor = drop, dim: int = dim) -> Tensor:
                if not out.numel():  # no proposals came this far
                    return out
                shape = [1] * out.dim()
                shape[dim] = -1
                # of either sign and of no shape: nothing later can be blind to it
                return out + drop.to(out).view(shape) * (1 + out.abs().amax()) * noise(out)

            hooks.enter_context(record.module.register_forward_hook(add_noise, prepend=True))
        moved = outputs(model, example_inputs)
    return bool(compare(still, moved, rtol=1e-5))


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """The model for a while with values of ordinary size in place of parameters that are zero or close to it."""
    generator = torch.Generator().manual_seed(0)
    before: list[tuple[Tensor, Tensor]] = []
    for _, p in weights_of(model):
        if not p.is_floating_point() or not p.numel():
            continue
        closed = p == 0 if float(p.abs().max()) > CLOSED else torch.ones_like(p, dtype=torch.bool)
        if bool(closed.any()):
            fan = max(p[0].numel(), 1) if p.dim() > 1 else 1
            values = (0.2 + 0.8 * torch.rand(p.shape, generator=generator)) / fan**0.5
            if fan > 1:
                values *= torch.randint(2, p.shape, generator=generator) * 2 - 1
            before.append((p.data, p.data.clone()))
            p.data.copy_(torch.where(closed, values.to(p), p))
    try:
        yield
    finally:
        for now, old in before:
            now.copy_(old)
