"""DistillHook: the network in training also learns from its own average, or from itself with all masks on."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn

from mmitp.attacks import pick_logits
from mmitp.engine.attack import unwrap
from mmitp.engine.hooks.prune_hook import PruneHook
from mmitp.engine.window import RunLength
from mmitp.pruning import distillation_loss, masked_layers, open_masks
from mmitp.registry import HOOKS
from mmitp.values import is_count, is_number


@HOOKS.register_module()
class DistillHook(Hook):
    """Adds ``loss_distill`` to a classifier's training loss: its distance from a teacher that is the network itself.

    The loss is ``weight * T^2 * KL`` of the class scores (:func:`mmitp.pruning.distillation_loss`). The teacher sees
    the very images that the network is trained on (attacked ones included) and costs one forward pass without gradient
    an iteration. Attacks do not raise this loss.

    Args:
        teacher: ``'ema'``, the average of an EMAHook in the same run, in evaluation mode; or ``'open'``, the same
            weights with every mask on, in training mode, as long as masks train (from the freeze on there is no such
            network, and the term is gone).
        weight: of the term.
        temperature: ``T``.
        begin: first epoch (or iteration, with an iteration-based loop) of the term, counted from 0: an average over
            the first steps has little to teach.
        scores: name of the module whose output are the class scores ``(N, K)`` in training.

    Raises:
        ValueError: an argument out of range; ``begin`` after the end of the run; no EMAHook for ``'ema'``; no masks
            that train for ``'open'``, or none any more at ``begin``; no module of the name, or one that gives no class
            scores. Detectors are refused that way.
    """

    # After AdversarialHook (NORMAL): what is attached to the preprocessor last sees the attacked images.
    priority = "LOW"

    def __init__(
        self,
        teacher: str = "ema",
        weight: float = 1.0,
        temperature: float = 2.0,
        begin: int = 0,
        scores: str = "head",
    ) -> None:
        if teacher not in ("ema", "open"):
            raise ValueError(f"DistillHook teacher must be 'ema' or 'open', got {teacher!r}")
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not (is_number(value) and value > 0):
                raise ValueError(f"DistillHook {name} must be a positive finite number, got {value!r}")
        if not isinstance(scores, str):
            raise ValueError(f"DistillHook scores must be the name of a module, got {scores!r}")
        if not is_count(begin, 0):
            raise ValueError(f"DistillHook begin must be a whole number of epochs (or iterations), got {begin!r}")
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.begin, self.scores = int(begin), scores
        self._average: nn.Module | None = None
        self._now = False  # whether this iteration has the term
        self._armed = False  # whether the training's own forward pass comes next, and no attack's
        self._student: Any = None
        self._handles: list[Any] = []

    def before_train(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        modules = dict(model.named_modules())
        if self.scores not in modules:
            raise ValueError(
                f"DistillHook: {type(model).__name__} has no module {self.scores!r}. It learns from class scores: name "
                "the module that gives them, scores=...; detectors, which have none, are not supported"
            )
        self.check_length(RunLength.of(runner))
        if self.teacher == "open":
            self._require_masks(runner, model)
        else:
            averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
            if not averages:
                raise ValueError(
                    "DistillHook teacher='ema' learns from the average of an EMAHook, and the run has none: add "
                    "dict(type='EMAHook', momentum=0.01) to custom_hooks, or take teacher='open'"
                )
            self._average = averages[0].module
        self._handles = [
            model.data_preprocessor.register_forward_hook(self._arm, with_kwargs=True),
            modules[self.scores].register_forward_hook(self._take_scores),
            model.register_forward_hook(self._add_loss, with_kwargs=True),
        ]

    def check_length(self, run: RunLength) -> list[str]:
        """Whether the term begins within a run; nothing to be told of if it does.

        Raises:
            ValueError: it does not.
        """
        length, unit = run.counted(run.by_epoch)
        if self.begin >= length:
            raise ValueError(
                f"DistillHook(begin={self.begin}) teaches nothing: the run ends after {length} {unit}, counted from 0. "
                "Set begin below that, or leave the hook out"
            )
        return []

    def _require_masks(self, runner: Runner, model: nn.Module) -> None:
        pruning = next((hook for hook in runner.hooks if isinstance(hook, PruneHook)), None)
        if not masked_layers(model) and (pruning is None or pruning.slimmed is None):
            raise ValueError(
                "DistillHook teacher='open' learns from the network with every mask on, and the model has no masks: "
                "take teacher='ema', or leave the hook out"
            )
        if pruning is None:
            return
        by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
        if self.begin * (1 if by_iter else len(runner.train_dataloader)) >= pruning.end * pruning.length:
            raise ValueError(
                f"DistillHook(begin={self.begin}, teacher='open') teaches nothing: masks are frozen by then "
                f"(PruneHook's end is {pruning.end} {'iterations' if pruning.by_iter else 'epochs'}). Let it begin "
                "before, or take teacher='ema'"
            )

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        now = runner.iter if isinstance(runner.train_loop, IterBasedTrainLoop) else runner.epoch
        self._now = now >= self.begin and (self.teacher == "ema" or self._masks_train(unwrap(runner.model)))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        self._now = self._armed = False

    @staticmethod
    def _masks_train(model: nn.Module) -> bool:
        return any(not layer.mask_frozen for layer in masked_layers(model).values())

    def _arm(self, preprocessor: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # A probe prepares batches within an iteration, too, but not for training.
        self._armed = self._now and bool(kwargs.get("training", args[1] if len(args) > 1 else False))

    def _take_scores(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._armed:
            self._student = output

    def _add_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self._armed or kwargs.get("mode") != "loss":
            return None
        self._armed = False  # before the teacher, who gives scores too
        student, self._student = pick_logits(self._student), None
        if not isinstance(student, Tensor) or student.dim() != 2:
            got = tuple(student.shape) if isinstance(student, Tensor) else type(student).__name__
            raise ValueError(
                f"DistillHook learns from class scores (N, K); in training {self.scores!r} of {type(model).__name__} "
                f"gives {got}. Name the module that gives them, scores=...; detectors are not supported"
            )
        teacher = self._teach(model, args, {**kwargs, "mode": "tensor"})
        return {**output, "loss_distill": self.weight * distillation_loss(student, teacher, self.temperature)}

    @torch.no_grad()
    def _teach(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        if self._average is not None:
            return pick_logits(self._average.eval()(*args, **kwargs))
        with open_masks(model):
            return pick_logits(model.forward(*args, **kwargs))  # past the model's own hooks
