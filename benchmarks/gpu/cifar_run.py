"""One run of a CIFAR config on the core alone: the config's recipe without mmengine's Runner, made for a CUDA graph.

Model, data, order of the images, crops, optimizer, schedule, attack and pruning are the config's own objects; what is
written here is the loop. On the CPU it trains what ``tools/train.py`` trains, image for image (a test compares them):

- Images and labels are on the device. An epoch's order and crops are drawn as the config's sampler and data set draw
  them, and copied in one tensor; a step takes its columns from it.
- Everything between that copy and the optimizer's step stays on the device, so that the step can be captured.
- At the end of the window masks freeze and, if the config says so, the small network takes the masked one's place.

A run is a generator of single steps, so that several of them can share a device. Where it says so it may be stopped:
what it saves then goes on as it would have gone on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from graphed import Graphed
from measured import dense_model, sizes
from mmengine import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATA_SAMPLERS, HOOKS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import set_random_seed
from records import write_json
from torch import Tensor, nn

from mmitp.attacks import CollapseRule, Probe, attack_mode, cross_entropy, fgsm_rs, pgd
from mmitp.datasets.cifar import FastCIFAR10
from mmitp.engine.attack import pixel_units, seeded_generator
from mmitp.engine.config import load_config
from mmitp.engine.example import blank_example
from mmitp.pruning import InTrainPruner, SlimPlan
from mmitp.pruning.check import counted_macs
from mmitp.pruning.live import plan_live, shrink_live

#: Images in a batch of an evaluation.
BATCH = 1000


@dataclass(frozen=True)
class Attack:
    """A PGD attack in pixels/255, as configs/cifar10/README.md reports robustness."""

    steps: int
    restarts: int = 1
    eps: float = 8.0
    alpha: float = 2.0

    @property
    def name(self) -> str:
        return f"pgd{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of its files.
        config: in configs/cifar10.
        options: overrides, as ``--cfg-options`` takes them.
        clean_weight: part of the loss that is taken on the images as they are; the rest is on attacked ones.
        published: what the paper reports of the config.
        attacks: that its end is evaluated under.
        control: whether the options give the widths of a control. Its operations and parameters are counted beside
            those of the config without them.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    clean_weight: float = 0.0
    published: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[Attack, ...] = ()
    control: bool = False


@dataclass
class Data:
    """Both sets on the device, shared by all runs."""

    train: FastCIFAR10
    test: FastCIFAR10

    @classmethod
    def load(cls, root: str, device: str) -> Data:
        sets = (FastCIFAR10(root, split, device=device) for split in ("train", "test"))
        return cls(*sets)


@dataclass
class State:
    """What a run has come to, besides weights, optimizer and pruner.

    Attributes:
        epoch: epochs done.
        curve: a dict for each of them.
        seconds: of training, by the clock, whatever ran beside it.
        beside: how many runs shared the device.
        figures: of the end: accuracy, operations and parameters kept, accuracy under attacks.
        slim: the slimmed network's structure, once there is one.
        probe: of the rule that tells a collapse.
        attacked: an evaluation under attack that is not at its end: ``attack``, ``restarts`` done, ``right`` images.
    """

    epoch: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    beside: list[int] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    slim: dict[str, Any] | None = None
    probe: dict[str, Any] = field(default_factory=dict)
    attacked: dict[str, Any] | None = None


class Run:
    """A row with a seed.

    Args:
        row: what to train.
        seed: of weights, order, crops and attacks.
        data: see :class:`Data`.
        device: where.
        folder: of ``<run>.json`` and ``<run>.pth``. What is there is gone on with.
        cfg: the row's config, if it was changed (:func:`config_of`).
        graph: whether steps are captured.
        bf16: whether the network, but not the attack, runs under autocast in bfloat16.
        about: commit, card and versions, for the file.
        look_every: epochs between evaluations.
    """

    def __init__(
        self,
        row: Row,
        seed: int,
        data: Data,
        device: str,
        folder: Path,
        cfg: Config | None = None,
        graph: bool = False,
        bf16: bool = False,
        about: Mapping[str, Any] | None = None,
        look_every: int = 20,
    ) -> None:
        self.row, self.seed, self.device, self.look_every = row, seed, torch.device(device), look_every
        self.name = f"{row.name}_s{seed}" + ("_bf16" if bf16 else "")
        self.path, self.weights = folder / f"{self.name}.json", folder / f"{self.name}.pth"
        self.about = dict(about or {})
        self.cfg = cfg or config_of(row)
        self.data, self.bf16 = data, bf16
        self.train_set = copy.copy(data.train)  # shares the images
        self.train_set.seed = seed
        self.epochs = int(self.cfg.train_cfg.max_epochs)
        self.batch_size = int(self.cfg.train_dataloader.batch_size)
        self.state = State()
        init_default_scope(self.cfg.default_scope)
        whole = config_of(replace(row, options=())) if row.control else self.cfg
        self.dense = sizes(MODELS.build(dense_model(whole)))
        set_random_seed(seed)
        self._build()
        self.generator = torch.Generator(self.device)
        widths = {len(batch) for batch in self._batches()}  # an epoch's last batch is smaller
        self.batches = {n: torch.zeros(4, n, dtype=torch.long, device=self.device) for n in widths}
        self.steps = {n: Graphed(partial(self._step, n), [self.generator], graph) for n in widths}
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.weights.is_file():
            self._load(torch.load(self.weights, map_location=self.device, weights_only=True))

    # -- the recipe, from the config

    def _build(self) -> None:
        cfg = self.cfg
        model = dict(copy.deepcopy(cfg.model), data_preprocessor=copy.deepcopy(cfg.data_preprocessor))
        self.model: nn.Module = MODELS.build(model)
        self.model.init_weights()
        self.model.to(self.device, memory_format=torch.channels_last)
        self.model.train()
        self.optimizer = build_optim_wrapper(self.model, copy.deepcopy(cfg.optim_wrapper)).optimizer
        merge_groups(self.optimizer)
        sampler = dict(cfg.train_dataloader.sampler, dataset=self.train_set, seed=self.seed)
        self.sampler = DATA_SAMPLERS.build(sampler)
        self.length = len(self._batches())
        self.schedulers = schedulers(cfg, self.optimizer, self.length)
        hooks = [HOOKS.build(copy.deepcopy(hook)) for hook in cfg.get("custom_hooks") or []]
        self.attack = next((h for h in hooks if type(h).__name__ == "AdversarialHook"), None)
        prune = next((h for h in hooks if type(h).__name__ == "PruneHook"), None)
        if self.attack is not None:
            assert self.attack.attack == "fgsm_rs"
        like = torch.zeros(1, 3, 1, 1, device=self.device)
        self.units = pixel_units(self.model.data_preprocessor, like)
        self.pruner: InTrainPruner | None = None
        self.slim_at_end = False
        self.window = (0, 0)
        if prune is not None:
            self.window = window_of(prune.window, self.epochs)
            self.slim_at_end = prune.slim_at_end
            steps = (self.window[1] - self.window[0]) * self.length
            self.pruner = InTrainPruner(
                self.model,
                blank_example(self.model, (32, 32)),
                prune.target,
                steps=steps,
                cost=prune.cost if prune.cost is not None else "macs",
                **prune.arguments,
            )
            self.pruner.attach(self.optimizer, captured=True)

    def _batches(self) -> list[list[int]]:
        order = list(self.sampler)
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    # -- a step

    def _step(self, n: int) -> None:
        chosen, row, column, mirror = self.batches[n]
        images = self.train_set.cut(chosen, row, column, mirror > 0)
        labels = self.data.train.labels[chosen]
        x = self._preprocessed(images)
        losses = []
        if self.attack is not None:
            losses.append((1 - self.row.clean_weight, self._attacked(x, labels)))
        if self.attack is None or self.row.clean_weight:
            losses.append((self.row.clean_weight if self.attack is not None else 1.0, x))
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            terms = [weight * F.cross_entropy(self._logits(images), labels) for weight, images in losses]
        loss = torch.stack(terms).sum()
        loss.backward()
        self.optimizer.step()
        self.loss += loss.detach() * n

    def _preprocessed(self, images: Tensor) -> Tensor:
        return self.model.data_preprocessor(dict(inputs=images), training=True)["inputs"]  # type: ignore[operator]

    def _logits(self, x: Tensor) -> Tensor:
        return self.model(x, mode="tensor")

    def _attacked(self, x: Tensor, labels: Tensor) -> Tensor:
        hook, units = self.attack, self.units
        assert hook is not None
        with attack_mode(self.model, batchnorm=hook.batchnorm, dropout=hook.dropout):
            return fgsm_rs(
                lambda images: F.cross_entropy(self._logits(images), labels),
                x,
                eps=hook.eps * units.unit,
                alpha=hook.alpha * units.unit,
                low=units.low,
                high=units.high,
                generator=self.generator,
                check=False,
            )

    # -- the run

    @property
    def trained(self) -> bool:
        return self.state.epoch >= self.epochs

    @property
    def finished(self) -> bool:
        return self.trained and all(attack.name in self.state.figures for attack in self.row.attacks)

    def work(self) -> Iterator[bool]:
        """Trains and evaluates, a step at a time; True where the run may be stopped and saved."""
        while not self.trained:
            yield from self._epoch()
        for attack in self.row.attacks:
            if attack.name not in self.state.figures:
                yield from self._evaluate(attack)
        yield True

    def _epoch(self) -> Iterator[bool]:
        epoch, start = self.state.epoch, time.perf_counter()
        self.model.train()
        if self.pruner is not None:
            self.pruner.active = self.window[0] <= epoch < self.window[1] and not self.pruner.frozen
        self.sampler.set_epoch(epoch)
        batches = self._batches()
        plan = self._plan(batches, epoch)
        self.loss.zero_()
        key, place = self._key(), 0
        for i, batch in enumerate(batches):
            n = len(batch)
            self.batches[n].copy_(plan[:, place : place + n])
            place += n
            # As AdversarialHook: a start depends on seed and iteration alone.
            seed = seeded_generator(self.seed, 0, epoch * self.length + i, "cpu").initial_seed()
            self.generator.manual_seed(seed)
            self.steps[n](key)
            if self.pruner is not None:
                self.pruner.advance()
            yield False
        for scheduler in self.schedulers:
            scheduler.step()
        loss = float(self.loss) / place
        if not loss < float("inf"):
            raise ValueError(f"the loss of epoch {epoch + 1} is {loss}: what was saved before is left as it is")
        if self.pruner is not None and epoch + 1 == self.window[1]:
            self._freeze()
        self.state.epoch += 1
        self.state.seconds += time.perf_counter() - start
        self._look(loss)
        yield True

    def _plan(self, batches: Sequence[Sequence[int]], epoch: int) -> Tensor:
        """Indices, rows, columns and mirror flags of an epoch's images in order, ``(4, images)``."""
        draws = [torch.stack([*map(torch.as_tensor, (b, *self.train_set.draw(b, epoch)))]) for b in batches]
        plan = torch.cat(draws, 1)
        if self.device.type == "cuda":
            plan = plan.pin_memory()
        return plan.to(self.device, non_blocking=True)

    def _key(self) -> tuple:
        rates = [tuple(group[k] for k in ("lr", "momentum", "weight_decay")) for group in self.optimizer.param_groups]
        masks = None if self.pruner is None else (self.pruner.active, self.pruner.frozen)
        return (*rates, masks, self.state.slim is not None)

    def _freeze(self) -> None:
        assert self.pruner is not None
        report = self.pruner.freeze()
        self.state.figures.update(
            macs_kept=report.macs_kept, params_kept=report.params_kept, before=report.ratio_before
        )
        if self.slim_at_end:
            self.optimizer.zero_grad()
            plan = plan_live(self.model, self.pruner.example, self.pruner.budget)
            self._shrink(plan)

    def _shrink(self, plan: SlimPlan) -> None:
        assert self.pruner is not None
        for step in self.steps.values():
            step.forget()  # a graph of the network as it was
        self.pruner.detach()
        shrink_live(self.model, plan, self.optimizer)
        self.state.slim, self.pruner = plan.spec(), None

    # -- figures

    def _look(self, loss: float) -> None:
        entry: dict[str, Any] = dict(epoch=self.state.epoch, loss=round(loss, 4), seconds=round(self.state.seconds, 2))
        if self.pruner is not None:
            entry["ops_kept"] = round(self.pruner.ratio(), 4)
        elif self.state.slim is not None:
            entry["ops_kept"] = round(self.state.figures["macs_kept"] / self.dense["macs"], 4)
        if self.trained or self.state.epoch % self.look_every == 0:
            right = self._right(self.data.test.bordered, self.data.test.labels)
            entry["accuracy"] = round(100 * float(right.float().mean()), 2)
            if self.attack is not None:
                entry["probe"] = self._probe()
            if self.trained:
                self._close(entry["accuracy"])
        self.state.curve.append(entry)
        self.write()

    def _close(self, accuracy: float) -> None:
        macs = counted_macs(self.model, blank_example(self.model, (32, 32)))
        self.state.figures.setdefault("macs_kept", macs)
        self.state.figures.setdefault("params_kept", sum(p.numel() for p in self.model.parameters()))
        self.state.figures.update(accuracy=accuracy, ops_kept=self.state.figures["macs_kept"] / self.dense["macs"])

    @torch.no_grad()
    def _right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Which images are classified right, in float32."""
        self.model.eval()
        parts = zip(images.split(BATCH), labels.split(BATCH), strict=True)
        return torch.cat([self._logits(self._preprocessed(x)).argmax(1) == y for x, y in parts])

    def _probe(self) -> dict[str, Any]:
        """Accuracy under the training attack and under PGD-5 on the same images, and whether that is a collapse."""
        assert self.attack is not None
        self.model.eval()
        images, labels = self.data.test.bordered[:BATCH], self.data.test.labels[:BATCH]
        x, rule = self._preprocessed(images), CollapseRule()
        rule.load_state_dict(self.state.probe or rule.state_dict())
        self.generator.manual_seed(0)
        attacked = [self._attacked(x, labels), self._pgd(x, labels, Attack(5, eps=8.0, alpha=2.0))]
        with torch.no_grad():
            single, multi = (float((self._logits(a).argmax(1) == labels).float().mean()) for a in attacked)
        verdict = rule.judge(Probe(single, multi, 0.1, len(labels)))
        self.state.probe = rule.state_dict()
        return dict(single=round(100 * single, 2), pgd5=round(100 * multi, 2), collapsed=verdict.collapsed)

    def _pgd(self, x: Tensor, labels: Tensor, attack: Attack) -> Tensor:
        units = self.units
        with attack_mode(self.model, freeze=True):
            return pgd(
                cross_entropy(self._logits, labels),
                x,
                eps=attack.eps * units.unit,
                alpha=attack.alpha * units.unit,
                steps=attack.steps,
                low=units.low,
                high=units.high,
                generator=self.generator,
                check=False,
            )

    def _evaluate(self, attack: Attack) -> Iterator[bool]:
        """Accuracy on the test set: images that the network gets right clean and after every restart."""
        test, so_far = self.data.test, self.state.attacked
        self.model.eval()
        if so_far is None or so_far["attack"] != attack.name:
            so_far = dict(attack=attack.name, restarts=0, right=self._right(test.bordered, test.labels))
        right = so_far["right"]
        for restart in range(so_far["restarts"], attack.restarts):
            for number, chosen in enumerate(torch.arange(len(test), device=self.device).split(BATCH)):
                chosen = chosen[right[chosen]]  # an image that was fooled once stays so
                if not len(chosen):
                    continue
                self.generator.manual_seed(1 + restart * len(test) + number)
                x, labels = self._preprocessed(test.bordered[chosen]), test.labels[chosen]
                attacked = self._pgd(x, labels, attack)
                with torch.no_grad():
                    right[chosen] = self._logits(attacked).argmax(1) == labels
                yield False
            self.state.attacked = dict(so_far, restarts=restart + 1)
            yield True
        self.state.attacked = None
        self.state.figures[attack.name] = round(100 * float(right.float().mean()), 2)
        self.write()
        yield True

    # -- files

    def write(self) -> None:
        """``<run>.json``."""
        state = self.state
        write_json(
            self.path,
            dict(
                row=self.row.name,
                config=self.row.config,
                options=list(self.row.options),
                clean_weight=self.row.clean_weight,
                seed=self.seed,
                bf16=self.bf16,
                published=dict(self.row.published),
                **self.about,
                state="finished" if self.finished else "running",
                epochs=self.epochs,
                macs_dense=self.dense["macs"],
                params_dense=self.dense["params"],
                seconds=round(state.seconds, 1),
                beside=sorted(set(state.beside)),
                **state.figures,
                curve=state.curve,
            ),
        )

    def save(self) -> None:
        """``<run>.pth``: all that going on needs; its ``state_dict`` is a checkpoint that tools/test.py reads."""
        part = self.weights.with_suffix(".tmp")
        torch.save(
            dict(
                state_dict=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                schedulers=[scheduler.state_dict() for scheduler in self.schedulers],
                pruner=self.pruner.state_dict() if self.pruner is not None else None,
                run=vars(self.state),
                meta=dict(seed=self.seed, config=self.row.config),
            ),
            part,
        )
        part.replace(self.weights)
        self.write()

    def _load(self, saved: dict[str, Any]) -> None:
        if saved["run"]["slim"] is not None:
            self._shrink(SlimPlan.from_spec(saved["run"]["slim"]))
        self.model.load_state_dict(saved["state_dict"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for scheduler, state in zip(self.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        if self.pruner is not None:
            self.pruner.load_state_dict(saved["pruner"])
        self.state = State(**saved["run"])


def config_of(row: Row) -> Config:
    """The row's config with its overrides."""
    root = Path(__file__).resolve().parents[2]
    return load_config(str(root / f"configs/cifar10/{row.config}.py"), row.options)


def merge_groups(optimizer: torch.optim.Optimizer) -> None:
    """Puts parameters with the same settings into one group: ``paramwise_cfg`` makes one of each, and every group is
    some kernels of its own."""
    merged: dict[tuple, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        key = tuple((k, v) for k, v in sorted(group.items()) if k not in ("params", "param_names"))
        if key in merged:
            merged[key]["params"] += group["params"]
        else:
            merged[key] = group
    optimizer.param_groups[:] = merged.values()


def window_of(window: Sequence[float], epochs: int) -> tuple[int, int]:
    """PruneHook's window in whole epochs; numbers below 1 with a decimal point are parts of the run."""
    begin, end = (max(round(n * epochs), 1) if isinstance(n, float) and 0 < n < 1 else int(n) for n in window)
    return begin, end


def schedulers(cfg: Config, optimizer: torch.optim.Optimizer, length: int) -> list[Any]:
    """The config's schedules of learning rate and momentum, by epochs.

    Raises:
        ValueError: one changes with every iteration, which a captured step cannot follow.
    """
    listed = cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]
    built = [
        PARAM_SCHEDULERS.build(dict(s), default_args=dict(optimizer=optimizer, epoch_length=length)) for s in listed
    ]
    if not all(scheduler.by_epoch for scheduler in built):
        raise ValueError(f"{cfg.filename}: schedules must go by epochs, a captured step holds its learning rate")
    return built
