"""CollapseGuardHook: watches single-step adversarial training for catastrophic overfitting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, get_args

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmitp.engine.attack import class_labels, training_loss, unwrap
from mmitp.engine.hooks.adversarial_hook import AdversarialHook, DataBatch
from mmitp.pruning.rng import kept_rng
from mmitp.registry import HOOKS

Action = Literal["warn", "restore", "switch", "restore_switch", "stop"]


@HOOKS.register_module()
class CollapseGuardHook(Hook):
    """Probes robustness with PGD on a few batches, and acts when single-step training has collapsed.

    Catastrophic overfitting (Wong et al. 2020): within an epoch the model learns to withstand the single step it is
    trained on and nothing else. The probe attacks the same few batches, in eval mode, with the training attack and
    with PGD at the same eps, and calls it a collapse when PGD's result is both

    - worse than ``drop`` times the best one since the eps in force came into force, and
    - worse than ``gap`` times the training attack's, which itself is better than guessing.

    Both are needed: in single-step training of small networks on CIFAR-10 that did not collapse (eps 8 to 52, alpha
    2 eps, probes of 64 to 200 images), PGD kept 0.64 to 1.23 of the training attack's accuracy wherever that beat
    guessing, but 0.41 in the first iterations, when neither did. A network that never was robust has nothing to lose,
    so that counts as no collapse.

    The result is the accuracy of a classifier (samples with one ``gt_label``), else the inverse of the model's training
    loss (detectors, where nothing counts as guessing). It needs an AdversarialHook in the same run.

    Args:
        interval: epochs (or iterations) between probes.
        by_epoch: unit of ``interval``.
        source: ``"val"``: the first batches of the validation set, held back from training, for models whose loss
            can be taken on them (classifiers); ``"train"``: the first batches of the training run, as the pipeline
            augmented them then. ``"auto"``: ``"val"`` if its samples carry a ``gt_label``, else ``"train"``.
        num_batches: batches to keep and probe.
        steps: PGD steps of the probe.
        alpha: its step in pixels/255; ``None``: a quarter of eps.
        drop: see above.
        gap: see above.
        action: ``"warn"`` only; ``"restore"``: weights, buffers and optimizer state go back to the last good probe
            (learning rates and schedules go on); ``"switch"``: the rest is trained with ``switch_to``;
            ``"restore_switch"``: both; ``"stop"``: restore and end the training. What changed shape since, or
            was frozen since by pruning, is not restored: then it only warns (and switches).
        switch_to: keywords of :meth:`AdversarialHook.switch`; ``alpha`` defaults to the eps of the run for N-FGSM and
            half of it for PGD. The default is PGD-2.

    Attributes:
        history: one dict a probe: ``iter`` (iterations done), ``single`` and ``pgd`` (results, higher is better),
            ``collapsed``.

    Raises:
        ValueError: for values that cannot guard, or a run without AdversarialHook.
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
        if min(interval, num_batches, steps) < 1 or not 0 < drop <= 1 or not 0 < gap <= 1:
            raise ValueError(
                "interval, num_batches and steps must be at least 1, drop and gap between 0 and 1, got "
                f"{interval}, {num_batches}, {steps}, {drop}, {gap}"
            )
        self.interval, self.by_epoch, self.source, self.num_batches = interval, by_epoch, source, num_batches
        self.steps, self.alpha, self.drop, self.gap, self.action = steps, alpha, drop, gap, action
        self.switch_to = dict(switch_to) if switch_to is not None else {"attack": "pgd", "steps": 2}
        self.history: list[dict[str, Any]] = []
        self._batches: list[Any] = []
        self._best = 0.0
        self._best_eps = 0.0
        self._good: dict[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Find the attack and keep the batches to probe."""
        attacks = [hook for hook in runner.hooks if isinstance(hook, AdversarialHook)]
        if len(attacks) != 1:
            raise ValueError(f"CollapseGuardHook needs exactly one AdversarialHook in the run, found {len(attacks)}")
        self._attack = attacks[0]
        self._batches = []
        if self.source != "train" and runner.val_loop is not None:
            # The loader draws its seed from the global generator: a run must not change because it is watched.
            with kept_rng():
                batches = [copy.deepcopy(batch) for batch in islice(runner.val_dataloader, self.num_batches)]
            if self.source == "val" or all(class_labels(_samples(batch)) is not None for batch in batches):
                self._batches = batches
        if self.source == "val" and not self._batches:
            raise ValueError("CollapseGuardHook(source='val') needs a validation dataloader with data")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: DataBatch = None) -> None:
        """With ``source="train"``, keep the first batches."""
        if len(self._batches) < self.num_batches:
            self._batches.append(copy.deepcopy(data_batch))

    def after_train_epoch(self, runner: Runner) -> None:
        """Probe."""
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self.probe(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: DataBatch = None, outputs: dict | None = None
    ) -> None:
        """Probe."""
        if not self.by_epoch and self.every_n_train_iters(runner, self.interval):
            self.probe(runner, runner.iter + 1)

    def probe(self, runner: Runner, done: int) -> None:
        """Attack the kept batches after ``done`` iterations, record the result, and act on a collapse."""
        attack = self._attack
        eps = attack.eps * attack.scale
        if eps == 0:
            return
        model = unwrap(runner.model)
        alpha = self.alpha if self.alpha is not None else eps / 4
        with _evaluating(model):
            single, chance = self._result(
                model, lambda *batch: attack.perturb(model, *batch, generator=_generator(batch))
            )
            multi, _ = self._result(
                model,
                lambda *batch: attack.perturb_pgd(
                    model, *batch, alpha=alpha, steps=self.steps, generator=_generator(batch)
                ),
            )
        if eps != self._best_eps:
            self._best, self._best_eps = multi, eps
        collapsed = multi < self.drop * self._best and multi < self.gap * single and single > chance
        self._best = max(self._best, multi)
        self.history.append({"iter": done, "single": single, "pgd": multi, "collapsed": collapsed})
        runner.message_hub.update_scalar("train/probe_single", single)
        runner.message_hub.update_scalar("train/probe_pgd", multi)
        if collapsed:
            self._act(runner, done, single, multi)
        elif self.action in ("restore", "restore_switch", "stop"):
            self._good = _snapshot(runner, done)

    def _result(self, model: nn.Module, perturb: Callable[[dict[str, Any], Any], Tensor]) -> tuple[float, float]:
        """Accuracy, or one over the mean loss, on the kept batches of all ranks; and what guessing would reach."""
        total = count = chance = 0.0
        for raw in self._batches:
            # Preprocessors write labels and meta data into the samples they are given.
            data = model.data_preprocessor(copy.deepcopy(raw), False)  # type: ignore[operator]
            attacked = {**data, "inputs": perturb(data, raw)}
            labels = class_labels(data["data_samples"])
            with torch.no_grad():
                if labels is None:
                    total += training_loss(model, data)(attacked["inputs"]).item()
                    count += 1
                else:
                    logits = model(attacked["inputs"], copy.deepcopy(data["data_samples"]), mode="tensor")
                    total += (logits.argmax(1) == labels.to(logits.device)).sum().item()
                    count += len(labels)
                    chance = 1 / logits.shape[1]
        device = next(model.parameters()).device
        sums = torch.tensor([total, count], dtype=torch.float64, device=device)
        all_reduce(sums)
        mean = (sums[0] / sums[1]).item()
        return (mean, chance) if chance else (1 / max(mean, 1e-12), 0.0)

    def _act(self, runner: Runner, done: int, single: float, multi: float) -> None:
        steps = []
        if self.action in ("restore", "restore_switch", "stop"):
            steps.append(_restore(runner, self._good))
        if self.action in ("switch", "restore_switch"):
            steps.append(self._switch())
        if self.action == "stop":
            runner.train_loop.stop_training = True
            steps.append("training ends here")
        runner.logger.warning(
            f"catastrophic overfitting after {done} iterations: {multi:.4g} under PGD-{self.steps} (best "
            f"{self._best:.4g}) against {single:.4g} under the training attack. "
            + ("; ".join(steps) or "Nothing is done about it (action='warn')")
        )

    def _switch(self) -> str:
        to = dict(self.switch_to)
        to.setdefault("alpha", self._attack.eps / 2 if to["attack"] == "pgd" else self._attack.eps)
        if all(getattr(self._attack, key) == value for key, value in to.items()):
            return f"already trained with {to}"
        self._attack.switch(**to)
        return f"training goes on with {to}"


def _samples(batch: Any) -> Any:
    return batch.get("data_samples") if isinstance(batch, dict) else None


def _generator(batch: tuple[dict[str, Any], Any]) -> torch.Generator:
    """The same random starts at every probe, so that results compare."""
    return torch.Generator(batch[0]["inputs"].device).manual_seed(0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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


def _snapshot(runner: Runner, done: int) -> dict[str, Any]:
    def to_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.detach().to("cpu", copy=True) for key, value in state.items()}

    return {
        "iter": done,
        "modules": {name: to_cpu(module.state_dict()) for name, module in _stateful(runner).items()},
        "optimizers": [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in _optimizers(runner)],
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
    return f"the state after {good['iter']} iterations is restored"
