"""CollapseGuardHook: watches single-step adversarial training for catastrophic overfitting."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from mmitp.attacks import CollapseRule, Probe, Verdict
from mmitp.attacks.arguments import check_arguments
from mmitp.engine.attack import ImageBatch, class_labels, logits_of, samples_of, training_loss, unwrap
from mmitp.engine.finite import diverged
from mmitp.engine.hooks.adversarial_hook import AdversarialHook
from mmitp.engine.hooks.prune_hook import STOPPED
from mmitp.engine.window import RunLength
from mmitp.pruning.rng import kept_rng
from mmitp.pruning.verify import eval_mode
from mmitp.registry import HOOKS
from mmitp.values import is_count, unlike

Action = Literal["warn", "restore", "switch", "restore_switch", "stop"]

_STATE_KEY = "mmitp_collapse_guard"

_SWITCH_KEYS = tuple(inspect.signature(AdversarialHook.switch).parameters)[1:]


@HOOKS.register_module()
class CollapseGuardHook(Hook):
    """Probes robustness with PGD on a few batches, and acts when single-step training has collapsed.

    Catastrophic overfitting (Wong et al. 2020): within an epoch the model learns to withstand the single step it is
    trained on and nothing else. The probe attacks the same few batches, in eval mode, with the training attack and
    with PGD at the same eps; what counts as a collapse is :class:`mmitp.attacks.CollapseRule`'s to say.

    The result is the accuracy of a classifier (samples with one ``gt_label``), else the inverse of the model's training
    loss (detectors, where nothing counts as guessing, so that a collapse before the first probe goes unseen). It needs
    an AdversarialHook in the same run.

    Checkpoints carry the probes and, where ``action`` restores, the last good state (on the CPU; it adds one copy of
    weights and optimizer state to each file). A resumed run probes the same images and judges as it would have gone
    on. Weights that are not finite are never kept as good; where training in one process diverges, the last good ones
    take their place, once, and else the run ends.

    Args:
        interval: epochs (or iterations) between probes.
        by_epoch: unit of ``interval``.
        source: ``"val"``: images of the validation set, held back from training, for models whose loss can be taken on
            them (classifiers); ``"train"``: of the training set, as its pipeline augments them under a fixed seed.
            ``"auto"``: ``"val"`` if its samples carry a ``gt_label``, else ``"train"``. Either is spread evenly over
            the data set.
        num_batches: batches to probe, of the data loader's size.
        steps: PGD steps of the probe.
        alpha: its step in pixels/255; ``None``: a quarter of eps.
        drop: see :class:`mmitp.attacks.CollapseRule`.
        gap: as there.
        action: ``"warn"`` only; ``"restore"``: weights, buffers and optimizer state go back to the last good probe
            (learning rates and schedules go on); ``"switch"``: the rest is trained with ``switch_to``;
            ``"restore_switch"``: both; ``"stop"``: restore, end the training and save the outcome as ``stopped.pth``.
            What changed shape since, or was frozen since by pruning, is not restored: then it only warns (and
            switches).
        switch_to: keywords of :meth:`AdversarialHook.switch`; ``alpha`` defaults to the eps of the run for N-FGSM and
            half of it for PGD. The default is PGD-2.

    Attributes:
        history: one dict a probe: ``iter`` (iterations done), ``eps`` (pixels/255, in force), ``single`` and ``pgd``
            (results, higher is better), ``collapsed``.

    Raises:
        ValueError: for values that cannot guard, and when training begins for a run without AdversarialHook, without
            data to probe, with ``switch_to`` that the AdversarialHook does not take, or with ``by_epoch=True`` in a
            loop by iterations.
    """

    # After pruning has acted on the epoch, before checkpoints are written.
    priority = "LOW"

    def __init__(
        self,
        interval: int = 1,
        by_epoch: bool = True,
        source: Literal["auto", "val", "train"] = "auto",
        num_batches: int = 2,
        steps: int = 5,
        alpha: float | None = None,
        drop: float = 0.5,
        gap: float = 0.5,
        action: Action = "warn",
        switch_to: dict[str, Any] | None = None,
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(f"action must be one of {get_args(Action)}, got {action!r}")
        if source not in ("auto", "val", "train"):
            raise ValueError(f"source must be 'auto', 'val' or 'train', got {source!r}")
        if not (is_count(interval) and is_count(num_batches) and is_count(steps)):
            raise ValueError(
                f"interval, num_batches and steps must be whole numbers of at least 1, got {interval!r}, "
                f"{num_batches!r}, {steps!r}"
            )
        if not isinstance(by_epoch, bool):
            raise ValueError(f"by_epoch must be True or False, got {by_epoch!r}")
        if not (switch_to is None or isinstance(switch_to, Mapping)):
            raise ValueError(f"switch_to must be a dictionary of an attack's settings, got {switch_to!r}")
        if unknown := [key for key in switch_to or () if key not in _SWITCH_KEYS]:
            raise ValueError(
                f"CollapseGuardHook(switch_to={dict(switch_to or {})}): AdversarialHook.switch takes no "
                f"{unknown[0]!r}, only {', '.join(map(repr, _SWITCH_KEYS))}"
            )
        check_arguments(eps=1.0, alpha=alpha, steps=steps)
        self.rule = CollapseRule(drop, gap)
        self.interval, self.by_epoch, self.source, self.num_batches = interval, by_epoch, source, num_batches
        self.steps, self.alpha, self.action = steps, alpha, action
        self.switch_to = dict(switch_to) if switch_to is not None else {"attack": "pgd", "steps": 2}
        self.history: list[dict[str, Any]] = []
        self._batches: list[Any] = []
        self._good: dict[str, Any] | None = None
        self._stopped = False

    def before_train(self, runner: Runner) -> None:
        """Find the attack and the batches to probe."""
        self._stopped = False
        for told in self.check_length(RunLength.of(runner)):
            runner.logger.warning(told)
        attacks = [hook for hook in runner.hooks if isinstance(hook, AdversarialHook)]
        if len(attacks) != 1:
            raise ValueError(f"CollapseGuardHook needs exactly one AdversarialHook in the run, found {len(attacks)}")
        self._attack = attacks[0]
        if self._switches:
            to = self._switch_target()
            if "attack" not in to:
                raise ValueError(f"CollapseGuardHook(switch_to={self.switch_to}) needs the key 'attack'")
            self._attack.check_attack(**to)
        if self._restores:
            self._attack.on_diverged = self._on_diverged
        self._batches, model = [], unwrap(runner.model)
        if self.source != "train" and runner.val_loop is not None:
            batches = _draw(runner.val_dataloader, self.num_batches)
            if self.source == "val" or all(class_labels(samples_of(batch), model) is not None for batch in batches):
                self._batches = batches
        if self.source == "val" and not self._batches:
            raise ValueError("CollapseGuardHook(source='val') needs a validation dataloader with data")
        if not self._batches:
            self._batches = _draw(runner.train_dataloader, self.num_batches)

    def check_length(self, run: RunLength) -> list[str]:
        """What is to be told of the probes in a run, a sentence each.

        Raises:
            ValueError: ``by_epoch=True`` in a loop by iterations.
        """
        if self.by_epoch and not run.by_epoch:
            raise ValueError(
                "CollapseGuardHook(by_epoch=True) needs an epoch-based loop: set by_epoch=False, and interval to the "
                "iterations between probes"
            )
        length, unit = run.counted(self.by_epoch)
        if self.interval <= length:
            return []
        return [f"CollapseGuardHook(interval={self.interval}) never probes: the run ends after {length} {unit}"]

    def after_train(self, runner: Runner) -> None:
        """Save what a stop has restored: the run may end between two saves."""
        if not self._stopped:
            return
        vars(runner.train_loop).pop("run_iter", None)
        done = dict(epoch=runner.epoch, iter=runner.iter)
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        runner.save_checkpoint(runner.work_dir, STOPPED, meta=done, by_epoch=by_epoch)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what later verdicts and acts depend on."""
        checkpoint[_STATE_KEY] = {"rule": self.rule.state_dict(), "history": self.history, "good": self._good}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """On resume, judge on; weights alone bring no past."""
        if getattr(runner, "_resume", False) and _STATE_KEY in checkpoint:
            state = checkpoint[_STATE_KEY]
            probe = dict(iter=0, eps=0.0, collapsed=False)
            if problem := unlike(state, dict(rule={}, history=[probe], good=None), _STATE_KEY):
                raise ValueError(f"{runner._load_from}: {problem}")
            self.rule.load_state_dict(state["rule"])
            self.history = [dict(probe) for probe in state["history"]]
            self._good = _to_cpu(state["good"]) if self._restores else None

    def after_train_epoch(self, runner: Runner) -> None:
        """Probe."""
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self.probe(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None, outputs: dict | None = None
    ) -> None:
        """Probe."""
        if not self.by_epoch and self.every_n_train_iters(runner, self.interval):
            self.probe(runner, runner.iter + 1)

    def probe(self, runner: Runner, done: int) -> None:
        """Attack the batches after ``done`` iterations, record the result, and act on a collapse."""
        attack = self._attack
        eps = attack.eps * attack.scale
        if eps == 0:
            return
        model = unwrap(runner.model)
        alpha = self.alpha if self.alpha is not None else eps / 4
        # Losses that draw (two-stage detectors sample proposals) draw the same at every probe, and not from the run's.
        with eval_mode(model), kept_rng(0):
            single, chance, images = self._result(
                model, lambda *batch: attack.perturb(model, *batch, generator=_generator(batch))
            )
            multi, _, _ = self._result(
                model,
                lambda *batch: attack.perturb_pgd(
                    model, *batch, alpha=alpha, steps=self.steps, generator=_generator(batch)
                ),
            )
        verdict = self.rule.judge(Probe(single, multi, chance, images))
        self.history.append(
            {"iter": done, "eps": float(eps), "single": single, "pgd": multi, "collapsed": verdict.collapsed}
        )
        runner.message_hub.update_scalar("train/probe_single", single)
        runner.message_hub.update_scalar("train/probe_pgd", multi)
        if verdict.collapsed:
            self._act(runner, done, verdict)
        elif not verdict.good:
            runner.logger.info(f"probe after {done} iterations: {verdict.reason}")
        elif self._restores and _finite_everywhere(runner):
            self._good = _snapshot(runner, done)

    @property
    def _restores(self) -> bool:
        return self.action in ("restore", "restore_switch", "stop")

    @property
    def _switches(self) -> bool:
        return self.action in ("switch", "restore_switch")

    def _result(self, model: nn.Module, perturb: Callable[[Any, Any], Any]) -> tuple[float, float, int]:
        """Accuracy, or one over the mean loss, on all ranks' batches; what guessing would reach; images of the former.

        Logits that are not finite classify nothing.
        """
        device = next(model.parameters()).device
        # Preprocessors write labels and meta data into the samples they are given.
        prepared = [model.data_preprocessor(copy.deepcopy(raw), False) for raw in self._batches]  # type: ignore[operator]
        labelled = [class_labels(samples_of(data), model) for data in prepared]
        # Right answers and losses do not add up: all batches of all ranks are counted by the one, or by the other.
        without = torch.tensor([float(any(labels is None for labels in labelled))], dtype=torch.float64, device=device)
        all_reduce(without)
        by_loss = bool(without.item())
        total = count = chance = 0.0
        for raw, data, labels in zip(self._batches, prepared, labelled, strict=True):
            attacked = perturb(data, raw)
            with torch.no_grad():
                if by_loss or labels is None:
                    total += training_loss(model, attacked)(ImageBatch.find(attacked).images).item()
                    count += 1
                else:
                    logits = logits_of(model)(attacked["inputs"])
                    right = (logits.argmax(1) == labels.to(logits.device)) & torch.isfinite(logits).all(1)
                    total += right.sum().item()
                    count += len(labels)
                    chance = 1 / logits.shape[1]
        sums = torch.tensor([total, count], dtype=torch.float64, device=device)
        all_reduce(sums)
        mean, counted = (sums[0] / sums[1]).item(), int(sums[1].item())
        return (mean, chance, counted) if chance else (1 / max(mean, 1e-12), 0.0, counted)

    def _act(self, runner: Runner, done: int, verdict: Verdict) -> None:
        steps = []
        if self._restores:
            steps.append(_restore(runner, self._good))
        if self._switches:
            steps.append(self._switch())
        if self.action == "stop":
            self._stop(runner.train_loop)
            steps.append("training ends here")
        runner.logger.warning(
            f"catastrophic overfitting after {done} iterations: {verdict.reason} (PGD-{self.steps}). "
            + ("; ".join(steps) or "Nothing is done about it (action='warn')")
        )

    def _stop(self, loop: Any) -> None:
        loop.stop_training = True
        self._stopped = True
        if isinstance(loop, EpochBasedTrainLoop) and not self.by_epoch:
            # That loop looks at stop_training between epochs alone: what is left of this one trains nothing.
            loop.run_iter = lambda *args, **kwargs: None

    def _switch_target(self) -> dict[str, Any]:
        to = dict(self.switch_to)
        to.setdefault("alpha", self._attack.eps / 2 if to.get("attack") == "pgd" else self._attack.eps)
        return to

    def _switch(self) -> str:
        to = self._switch_target()
        if all(getattr(self._attack, key) == value for key, value in to.items()):
            return f"already trained with {to}"
        self._attack.switch(**to)
        return f"training goes on with {to}"

    def _on_diverged(self, runner: Runner) -> bool:
        good = self._good
        # Not between processes: those whose own loss is finite still would train on.
        if good is None or good["used"] or get_world_size() > 1:
            return False
        said = _restore(runner, good)
        # Once: what diverges from the same state again does so until the end.
        good["used"] = _finite_everywhere(runner)
        if good["used"]:
            runner.logger.warning(f"training has diverged in iteration {runner.iter + 1}: {said}")
        return good["used"]


def _draw(loader: Any, batches: int) -> list[Any]:
    """This rank's ``batches`` of images spread evenly over a loader's data set; the same ones at every call.

    A run must not change because it is watched: every generator is as it was before.
    """
    dataset, size = loader.dataset, loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "CollapseGuardHook takes its images from a data set with a length: give the run a validation set with one "
            "(source='val')"
        )
    if not len(dataset):
        return []
    wanted = min(batches * size * get_world_size(), len(dataset))
    indices = [i * len(dataset) // wanted for i in range(wanted)]
    mine = indices[get_rank() :: get_world_size()] or indices[:1]
    chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
    with kept_rng(0):  # pipelines draw from the global generators
        return [loader.collate_fn(_read(dataset, chunk)) for chunk in chunks]


def _read(dataset: Any, indices: list[int]) -> Any:
    """A batch as torch's loaders read it: at once from data sets that hand over whole ones."""
    whole = getattr(dataset, "__getitems__", None)
    return whole(indices) if whole is not None else [dataset[index] for index in indices]


def _generator(batch: tuple[Any, Any]) -> torch.Generator:
    """The same random starts at every probe, so that results compare."""
    return torch.Generator(ImageBatch.find(batch[0]).images.device).manual_seed(0)


def _stateful(runner: Runner) -> dict[str, nn.Module]:
    """The model and what hooks average from it."""
    averaged = [getattr(hook, "ema_model", None) for hook in runner.hooks]
    return {
        "model": unwrap(runner.model),
        **{f"ema{index}": ema for index, ema in enumerate(averaged) if ema is not None},
    }


def _optimizers(runner: Runner) -> list[torch.optim.Optimizer]:
    wrapper = runner.optim_wrapper
    return [single.optimizer for single in (wrapper.values() if hasattr(wrapper, "values") else [wrapper])]


def _finite_everywhere(runner: Runner) -> bool:
    """Whether no weight or buffer of any rank has diverged."""
    entries = [entry for module in _stateful(runner).values() for entry in module.state_dict(keep_vars=True).items()]
    device = entries[0][1].device  # an averaged model counts its steps on the host
    broken = torch.stack([diverged(*entry).to(device) for entry in entries]).any().to(torch.float64)
    all_reduce(broken)
    return not broken.item()


def _to_cpu(state: Any) -> Any:
    """A copy on the CPU, tensor by tensor, so that none is made on the accelerator."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_to_cpu(value) for value in state)
    return copy.deepcopy(state)


def _snapshot(runner: Runner, done: int) -> dict[str, Any]:
    return {
        "iter": done,
        "modules": {name: _to_cpu(dict(module.state_dict())) for name, module in _stateful(runner).items()},
        "optimizers": [_to_cpu(optimizer.state_dict()["state"]) for optimizer in _optimizers(runner)],
        "used": False,
    }


def _restore(runner: Runner, good: dict[str, Any] | None) -> str:
    if good is None:
        return "there is no good state to restore yet"
    modules = _stateful(runner)
    for name, module in modules.items():
        now, then = module.state_dict(), good["modules"].get(name, {})
        if now.keys() != then.keys() or any(now[key].shape != then[key].shape for key in now):
            return "the last good state is of another shape and is not restored"
        # A frozen pattern stands for a decision of the schedule, which does not go back.
        if any("prune_pattern" in key and not torch.equal(now[key].cpu(), then[key]) for key in now):
            return "masks were frozen after the last good state, which is not restored"
    for name, module in modules.items():
        module.load_state_dict(good["modules"][name])
    for optimizer, state in zip(_optimizers(runner), good["optimizers"], strict=True):
        # Only the moments: learning rates belong to the schedule, which goes on.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(state)})
        # Gradients that wait for the rest of an accumulated step are another network's.
        optimizer.zero_grad()
    return f"the state after {good['iter']} iterations is restored"
