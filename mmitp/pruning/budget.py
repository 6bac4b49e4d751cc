"""The operation budget of the whole model, exact and differentiable in the masks (S2).

    psi_t = MACs_t(masks) / MACs_dense,   L_HW = max(sum_t psi_t - psi*, 0)
    MACs_t = k_h * k_w * H_out * W_out * n_in(t) * n_out(t) / groups

``n_in`` counts the kept input channels, ``n_out`` the output channels that at least one reader keeps. All layers are
evaluated at once on flat vectors, in float64, so that the figure is the exact integer an independent counter finds on
the slimmed network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .cost import Cost, CostRatio, MacCost, make_cost
from .graph import ChannelGraph, LayerRecord, record_graph
from .graph_check import layers_that_move
from .layers import masked_layers, require_plain
from .masks import MaskedLayer, binarize_rows, first_maxima, ste_derivative, weights_of
from .needs import KeptChannels, Needs, channel_masked, solve_needs
from .tables import Copies, Tables, kernel_size, tables_of

if TYPE_CHECKING:
    from .slim import SlimPlan


class LayerRow(NamedTuple):
    """One layer of :meth:`MacBudget.table`; MACs at the example's input size, batch included."""

    name: str
    macs_dense: int
    macs_kept: int
    in_channels: int
    in_kept: int
    out_channels: int
    out_kept: int
    note: str


class MacBudget:
    """Multiply-accumulates of a masked model, dense and kept, from one recorded forward pass.

    Convolutions, transposed and deformable convolutions (their offset convolutions too), linear layers and every other
    product with a weight (recurrent layers, attention's projections, ``x @ w``, ``einsum``) of the whole model count,
    masked or not; products of two activations, normalisation, sampling and elementwise operations do not (see
    :mod:`mmitp.pruning.products`). A module that runs several times counts each time. The batch of the example counts
    too: take a batch of one for MACs an image.

    A mask that cannot count is held open: all of its channels are on, and it trains no more. Those are masks of layers
    whose weight other code reads or shares, of layers that never run in evaluation, and of layers that read the model's
    input (unless ``mask_model`` was given their names). Such a layer is dense in the budget, in training and after
    slimming, and listed in ``unfollowed``.

    One example shows one path through the model's code. Where the code branches on sizes, batches or values, another
    input may need channels that this one does not; ``more_examples`` are recorded into the same graph.

    Args:
        model: the masked (or dense) model; callable as ``model(example)``, ``model(*tuple)`` or ``model(**dict)``.
        example_inputs: a tensor, tuple or dict of the size the MACs are stated for.
        check: perturb what a random pattern drops and see that no output moves; layers that fail stay dense.
        cost: what is held to the target instead of MACs: ``'params'``, or what else
            :func:`mmitp.pruning.cost.make_cost` takes. MACs are told in any case.
        more_examples: inputs of other sizes or batches, at which the slimmed network has to be right too. What any of
            them needs is needed; MACs are those of ``example_inputs``.

    Attributes:
        dense_macs: MACs of the unpruned model (int).
        dense_cost: what it costs in ``unit``: its MACs, unless another cost was given (int).
        dense_params: its parameters, masks not counted (int).
        entries: ``(n_entries,)`` int64, the entries of the flat vectors among those of the dense network: all, until
            some are cut off (:meth:`cut_off`).
        cut: what has been cut out of the model since the budget was made; None while nothing has been.
        whole_tensors: whether that left tensors their widths.
        present: ``(n_nodes,)`` bool, the channels that the model's tensors still carry.
        kept: the rule by which they go on losing some.
        unfollowed: name -> why, for layers and operations the channel graph could not follow (they stay dense), and
            for what multiplies and could not be counted.

    Raises:
        ValueError: the pass runs no layer that counts or returns no tensor; there is no such cost; a masked layer was
            parametrized after it got its mask; masks on the meta device.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmitp.pruning import MacBudget, mask_model
        >>> net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)))
        >>> budget = MacBudget(net, torch.randn(1, 3, 5, 5))
        >>> budget.dense_macs  # 5 * 5 * (3 * 8 + 8 * 4)
        1400
        >>> net[1].prune_mask.data[:4] = -1  # the first layer need not compute what the second does not read
        >>> budget.kept_macs(), budget.ratio().item(), budget.hw_loss(0.25).item()
        (700, 0.5, 0.25)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        check: bool = True,
        cost: str | Mapping[str, Any] | Cost | None = None,
        more_examples: Sequence[Any] = (),
    ) -> None:
        counted = None if cost is None else make_cost(cost)
        require_plain(model)
        if on_meta := [name for name, layer in masked_layers(model).items() if layer.prune_mask.is_meta]:
            raise ValueError(
                f"the mask of {on_meta[0]!r} is on the meta device ({len(on_meta)} in all), where no value says what "
                "is kept: give the model storage (to_empty, then load_state_dict) before its budget is made"
            )
        self.graph: ChannelGraph = record_graph(model, example_inputs, more_examples)
        self.dense_params = sum(p.numel() for _, p in weights_of(model))
        self.dense_pads = {pad: (pad.front, pad.front + pad.in_channels) for pad in self.graph.pads}
        self.cut: SlimPlan | None = None
        self.whole_tensors = False
        self._prepare()
        if check and self.n_entries:
            self._check(model, (example_inputs, *more_examples))
        counting = set(self.patterns(torch.ones(self.n_entries)))
        self._held = [layer for layer in masked_layers(model).values() if layer not in counting]
        self.hold_masks()
        self._macs = MacCost()
        self.cost = counted or self._macs
        for each in {self._macs, self.cost}:
            each.bind(self, model)
        self.dense_cost = self.cost_of(torch.ones(self.n_entries, dtype=torch.bool))

    def _prepare(self) -> None:
        self.needs: Needs = solve_needs(self.graph)
        self.unfollowed = dict(self.graph.unfollowed)
        self.layers: list[LayerRecord] = self.graph.layers
        for index in self.needs.dead:
            self.layers[index].note = "its output is never read: held at full size"
        self.n_entries = self.needs.n_entries
        self.entries = torch.arange(self.n_entries)
        self.present = torch.ones(self.graph.n_nodes, dtype=torch.bool)
        self.kept = KeptChannels(self.graph)
        owners: dict[int, tuple[str, MaskedLayer]] = {}
        held: list[Tensor] = []
        for record, entries in zip(self.layers, self.needs.layer_entries, strict=True):
            if entries is not None and record.mask and id(record.mask.prune_mask) not in owners:
                owners[id(record.mask.prune_mask)] = record.name, record.mask
                held.append(entries)
        self._masked = list(owners.values())
        self._copies: dict[torch.device, Copies] = {}  # empty where no masks are tied
        if sum(map(len, held)) > self.n_entries:
            self._copies[torch.device("cpu")] = Copies.of(torch.cat(held), self.n_entries)
        self.dense_macs = sum(record.dense_macs for record in self.layers)
        self._tables: dict[torch.device, Tables] = {}
        self._tables[torch.device("cpu")] = tables_of(self.graph, self.needs)

    def hold_masks(self) -> None:
        """Freezes the masks that do not count with every channel on.

        Done when the budget is made; to be done again after masks were unfrozen. Frozen ones stay as they are: the
        network was trained with them. A held mask stays a parameter with a zero gradient, as any frozen one, so that
        optimizers and distributed training do not notice.
        """
        for layer in self._held:
            if not layer.mask_frozen:
                layer.freeze_mask(torch.ones_like(layer.prune_pattern))

    # -- a network that is cut while its masks train (mmitp.pruning.progressive)

    def restricted(self, keep: Tensor) -> MacBudget:
        """This budget once the entries not in ``keep`` (flat bool) are off for good; for figures of flat patterns.

        The dense network, of which ratios are parts, stays the same.
        """
        small = copy.copy(self)
        small._restrict(keep)
        small.cost = self.cost.of_restricted(small)
        return small

    def _restrict(self, keep: Tensor) -> None:
        cpu = torch.device("cpu")
        self._tables = {cpu: self._tables[cpu].without(keep)}
        self._copies = {cpu: self._copies[cpu].without(keep)} if self._copies else {}
        self.entries, self.n_entries = self.entries[keep], int(keep.sum())

    def cut_off(self, keep: Tensor, cut: SlimPlan, present: Tensor, whole_tensors: bool) -> None:
        """Takes note that the model has been cut: vectors are shorter from now on, costs and ratios the same.

        Args:
            keep: flat bool, the mask entries that stay.
            cut: what stays, in the dense network's channels.
            present: ``(n_nodes,)`` bool, the channels that tensors keep from now on.
            whole_tensors: whether they keep their widths.
        """
        self._restrict(keep)
        self.cut, self.present, self.whole_tensors = cut, present, whole_tensors
        self.kept = KeptChannels(self.graph, present)

    def move_to(self, origin: nn.Module, model: nn.Module) -> None:
        """Makes the budget recorded on ``origin`` that of ``model``, which has modules of the same names."""
        names, modules = {m: name for name, m in origin.named_modules()}, dict(model.named_modules())

        def there(module: Any) -> Any:
            return modules[names[module]]

        for record in self.layers:
            record.module = record.module and there(record.module)
        self.graph.norms = {there(m): calls for m, calls in self.graph.norms.items()}
        self.graph.pads = {there(m): calls for m, calls in self.graph.pads.items()}
        self.dense_pads = {there(m): sizes for m, sizes in self.dense_pads.items()}
        self._masked = [(name, there(m)) for name, m in self._masked]
        self._held = [there(m) for m in self._held]

    def in_dense(self, pattern: Tensor) -> Tensor:
        """A flat bool pattern over the dense network's mask entries, on the CPU: what was cut off is off."""
        on = torch.zeros(self.needs.n_entries, dtype=torch.bool)
        on[self.entries[pattern.cpu()]] = True
        return on

    # -- flat vectors

    def copies(self, device: torch.device) -> Copies | None:
        """Where tied masks hold an entry several times; None where none are tied."""
        if not self._copies:
            return None
        if device not in self._copies:
            cpu = self._copies[torch.device("cpu")]
            self._copies[device] = Copies(cpu.entry.to(device), cpu.first.to(device))
        return self._copies[device]

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Gives every copy of a tied entry the sum of all copies' gradients, which one shared mask would have.

        To be called between the backward pass and the optimizer's step, so that tied masks stay equal; the pruner does.
        """
        masks = [layer.prune_mask for _, layer in self._masked]
        copies = self.copies(masks[0].device) if masks else None
        if copies is None or all(m.grad is None for m in masks):
            return
        grads = [torch.zeros_like(m) if m.grad is None else m.grad for m in masks]
        whole = self.split(copies.summed(torch.cat([g.reshape(-1) for g in grads])))
        for (name, layer), grad in zip(self._masked, grads, strict=True):
            if layer.mask_ties is not None:
                layer.prune_mask.grad = grad.copy_(whole[name])

    def require_tied(self) -> None:
        """Refuses a model whose tied masks have come apart.

        Raises:
            ValueError: names the layers.
        """
        on = self.flat_pattern()
        if self.copies(on.device) is None:
            return
        apart = [
            n
            for (n, m), own in zip(self._masked, self.split(on).values(), strict=True)
            if not torch.equal(own, m.binary_mask() > 0)
        ]
        if apart:
            raise ValueError(
                f"the masks of {', '.join(apart[:3])} ({len(apart)} in all) drop other channels than the masks that "
                "they are tied to (share_masks): train them by InTrainPruner, or call the budget's tie_gradients() "
                "between the backward pass and the optimizer's step. A checkpoint whose masks trained untied slims "
                "as it is: leave the sharing out (model.prune.share=None)"
            )

    @property
    def masked(self) -> list[tuple[str, MaskedLayer]]:
        """The masked layers that count, by name, in the order of the flat vectors; of sharers of a mask the first."""
        return self._masked

    def tables(self, device: torch.device) -> Tables:
        """The budget's index vectors on a device (moved once)."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def flat_masks(self) -> Tensor:
        """All counting masks ``M`` as one float32 vector, attached to the graph; empty where no masked layer runs."""
        masks = torch.cat([layer.prune_mask.reshape(-1) for _, layer in self._masked] or [torch.zeros(0)])
        copies = self.copies(masks.device)
        return masks if copies is None else copies.one_of_each(masks)

    def flat_pattern(self) -> Tensor:
        """The binary patterns in force as one bool vector of the same order."""
        if not any(layer.mask_frozen for _, layer in self._masked):
            return self.binarize(self.flat_masks().detach())
        on = torch.cat([layer.binary_mask().reshape(-1) > 0 for _, layer in self._masked])
        copies = self.copies(on.device)
        return on if copies is None else on[copies.first]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cuts a flat vector into the masks' shapes, by layer name."""
        sizes = [layer.prune_mask.numel() for _, layer in self._masked]
        if (copies := self.copies(flat.device)) is not None:
            flat = flat[copies.entry]
        return {
            name: part.view(layer.prune_mask.shape)
            for (name, layer), part in zip(self._masked, flat.split(sizes), strict=True)
        }

    def patterns(self, flat: Tensor) -> dict[MaskedLayer, Tensor]:
        """A flat vector's part for every layer whose mask counts, layers that share a mask included."""
        parts = {
            id(layer.prune_mask): part for (_, layer), part in zip(self._masked, self.split(flat).values(), strict=True)
        }
        return {
            r.mask: parts[id(r.mask.prune_mask)]
            for r, entries in zip(self.layers, self.needs.layer_entries, strict=True)
            if entries is not None and r.mask is not None
        }

    def binarize(self, masks: Tensor) -> Tensor:
        """:func:`~mmitp.pruning.masks.binarize` for all masks at once: bool, with each mask's first maximum on."""
        tables = self.tables(masks.device)
        return binarize_rows(masks, tables.entry_part, tables.n_parts)

    def last_of_parts(self, masks: Tensor) -> Tensor:
        """The entries that stay on whatever the masks are (flat bool): each mask's first maximum, each part's of a tied
        one."""
        tables = self.tables(masks.device)
        return first_maxima(masks, tables.entry_part, tables.n_parts)

    # -- figures

    def macs_of(self, pattern: Tensor) -> int:
        """MACs (int) with a flat bool pattern in place of the masks'."""
        return int(self._macs.total(self.tables(pattern.device), pattern.double()))

    @property
    def what(self) -> str:
        """What the budget is about: ``'operations'``, ``'parameters'`` or ``'latency'``."""
        return self.cost.what

    @property
    def unit(self) -> str:
        """What it counts: ``'MACs'``, ``'parameters'`` or ``'ns'``."""
        return self.cost.unit

    def cost_of(self, pattern: Tensor) -> int:
        """Cost with a flat bool pattern in place of the masks' (rounded up)."""
        return math.ceil(self.cost_tensor(pattern))

    def cost_tensor(self, pattern: Tensor) -> Tensor:
        """:meth:`cost_of` as 0-dim float64 tensor on the pattern's device, not rounded: nothing is read."""
        return self.cost.total(self.tables(pattern.device), pattern.double())

    def kept_cost(self) -> int:
        """Cost of the network that slimming leaves."""
        return self.cost_of(self.flat_pattern())

    def ratio(self) -> Tensor:
        """Fraction of the operations (of the cost) kept: 0-dim float64 tensor, differentiable in the masks (zero in
        frozen ones)."""
        if not self._masked:
            return torch.ones((), dtype=torch.float64)
        masks = self.flat_masks()
        on, live = self._on_and_live(masks)
        return CostRatio.apply(masks, on, live, self.tables(masks.device), self.cost, self.dense_cost)

    def marginal_costs(self) -> Tensor:
        """``dratio/dM_b``, flat: the part of the cost that each mask entry alone adds, whatever its real value.

        Zero for frozen masks, and where another reader needs the channel and the layer itself costs nothing more.
        """
        masks = self.flat_masks().detach()
        on, live = self._on_and_live(masks)
        return self._gradient(on, live, 1.0).to(masks.dtype)

    def hw_gradient(self, target: float, masks: Tensor | None = None) -> Tensor:
        """``dL_HW/dM``, flat: zero where the hinge is closed. :meth:`hw_loss` by autograd gives the same.

        Args:
            target: ``psi*``.
            masks: flat vector in place of the model's masks, on any device.
        """
        masks = self.flat_masks().detach() if masks is None else masks
        on, live = self._on_and_live(masks)
        above = self.cost_tensor(on) / self.dense_cost - target > 0
        return self._gradient(on, live, above.double()).to(masks.dtype) * ste_derivative(masks)

    def _gradient(self, on: Tensor, live: Tensor, d_ratio: Tensor | float) -> Tensor:
        """``dratio/dM_b`` times ``d_ratio``: float64, zero in frozen masks."""
        return self.cost.marginal(self.tables(on.device), on) * live * (d_ratio / self.dense_cost)

    @torch.no_grad()
    def _on_and_live(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The pattern in force where the masks are ``masks``, as float64; and 1 where they train, 0 where not."""
        if not any(layer.mask_frozen for _, layer in self._masked):
            return self.binarize(masks.detach()).double(), masks.new_ones(())
        frozen = [torch.full_like(m.prune_mask, m.mask_frozen, dtype=torch.bool).reshape(-1) for _, m in self._masked]
        fixed = torch.cat(frozen).to(masks.device)
        return self.flat_pattern().to(masks.device).double(), (~fixed).to(masks.dtype)

    def kept_macs(self) -> int:
        """MACs of the network that slimming leaves (int)."""
        return self.macs_of(self.flat_pattern())

    def hw_loss(self, target: float) -> Tensor:
        """``L_HW = max(ratio - target, 0)`` (S2), 0-dim float64.

        Raises:
            ValueError: ``target`` outside (0, 1].
        """
        if not 0 < target <= 1:
            raise ValueError(f"target must be a fraction of the dense operations in (0, 1], got {target}")
        return torch.relu(self.ratio() - target)

    def min_ratio(self) -> float:
        """The cheapest ratio the masks can reach: one (the first) input channel a layer."""
        masks = torch.full((self.n_entries,), -1.0)
        return self.cost_of(self.binarize(masks)) / self.dense_cost

    def table(self) -> list[LayerRow]:
        """One row a layer, in the order of execution."""
        tables = self._tables[torch.device("cpu")]
        on = self.flat_pattern().cpu().double()
        n_in, n_out = tables.channels(on, tables.needs(on)[1])
        macs = self._macs.layers(torch.arange(len(self.layers)), n_in, n_out).tolist()
        rows = []
        for i, (record, entries) in enumerate(zip(self.layers, self.needs.layer_entries, strict=True)):
            in_kept, out_kept, note = int(n_in[i]), int(n_out[i]), record.note
            if entries is not None and not channel_masked(record):
                note = f"{in_kept} of {record.n_in * record.n_out * kernel_size(record)} weights kept"
                in_kept, out_kept = record.n_in, record.n_out
            elif record.groups > 1:
                in_kept = out_kept * record.n_in // record.n_out
            elif entries is None and not note:
                note = "dense"
            rows.append(
                LayerRow(
                    record.name, record.dense_macs, int(macs[i]), record.n_in, in_kept, record.n_out, out_kept, note
                )
            )
        return rows

    def node_needs(self, pattern: Tensor | None = None) -> Tensor:
        """``(n_nodes,)`` bool: the channels needed under a flat pattern (the present one by default)."""
        on = (self.flat_pattern() if pattern is None else pattern).cpu()
        return self.needed_nodes(on.double())

    def needed_nodes(self, on: Tensor) -> Tensor:
        """:meth:`node_needs` on the device of a flat float pattern: nothing is read."""
        tables = self.tables(on.device)
        _, needed = tables.needs(on)
        always = torch.ones(1, dtype=torch.bool, device=on.device)
        return torch.cat([needed > 0, always])[tables.node_set]

    # -- the check that the graph tells the truth

    def _check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        # Half of the masks show what a usual pattern drops; next to none, what has many readers and seldom drops.
        for keep in (0.5, 0.0):
            pattern = self.binarize(keep - torch.rand(self.n_entries, generator=generator))
            needed = self.node_needs(pattern)
            moved = layers_that_move(model, examples, self.layers, self.patterns(pattern), needed)
            for index in moved:
                record = self.layers[index]
                self.graph.always[record.out_nodes] = True
                self.graph.unfollowed[record.name] = "its outputs are read in a way the channel graph did not see"
            if moved:
                self._prepare()
                if not self.n_entries:
                    return
