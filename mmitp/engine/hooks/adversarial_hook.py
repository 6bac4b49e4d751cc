"""AdversarialHook: trains any mmengine model on attacked images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from mmitp.attacks import attack_mode, fgsm_rs, n_fgsm, pgd
from mmitp.attacks.gradient import LossFn, Norm
from mmitp.attacks.mode import BatchNormMode, DropoutMode
from mmitp.engine.attack import (
    check_pixel_range,
    image_area,
    pixel_units,
    seeded_generator,
    training_loss,
    unwrap,
)
from mmitp.registry import HOOKS

Attack = Literal["fgsm_rs", "n_fgsm", "pgd"]
DataBatch = dict | tuple | list | None

_STATE_KEY = "mmitp_adversarial"


@HOOKS.register_module()
class AdversarialHook(Hook):
    """Replaces every training batch by its attacked version, behind the data preprocessor.

    The attack goes through the network as it stands (masks of a pruning run included), in float32 even under automatic
    mixed precision, and raises the model's own training loss. It is the published robust training (FGSM-RS, Wong et
    al. 2020) by default. Evaluation is never attacked. Nothing else is required of the model than ``mode="loss"``.

    Args:
        eps: size of the attack in pixels/255 of the un-normalised image, whatever mean, std or channel order the
            preprocessor applies (``norm="l2"``: radius in the same unit).
        alpha: step, same unit.
        attack: ``"fgsm_rs"``, ``"n_fgsm"`` or ``"pgd"``.
        steps: steps of ``"pgd"``.
        norm: threat model of ``"pgd"``.
        noise: ``"n_fgsm"``'s noise in multiples of eps.
        begin: first epoch (or iteration) that is attacked, counted from 0.
        end: first one that no longer is; ``None``: to the end.
        warmup: epochs (or iterations) over which eps and alpha grow linearly from 0 to full size, from ``begin`` on.
        by_epoch: whether ``begin``, ``end`` and ``warmup`` count epochs (fractions are allowed) or iterations.
        batchnorm: state of BatchNorm in the attack, see :func:`mmitp.attacks.attack_mode`. ``"train"`` is what the
            FastAT reference does: batch statistics, and the attack's pass updates the running ones too.
        dropout: ``"train"`` or ``"eval"``.
        losses: which of the model's loss terms the attack raises, shell-style patterns (``["loss_center_heatmap"]``);
            ``None``: all.
        pixel_range: full white before normalisation, 255 or, where the pipeline scales images to [0, 1], 1.
        seed: of the random starts; ``None``: the runner's. The start depends on seed, rank and iteration alone, so
            a resumed run continues as it would have gone on.

    Attributes:
        scale: share of eps in force at the current iteration, 0 where no attack is made.

    Raises:
        ValueError: for values that make no attack.
    """

    priority = "NORMAL"

    def __init__(
        self,
        eps: float = 8.0,
        alpha: float = 10.0,
        attack: Attack = "fgsm_rs",
        steps: int = 1,
        norm: Norm = "linf",
        noise: float = 2.0,
        begin: float = 0,
        end: float | None = None,
        warmup: float = 0,
        by_epoch: bool = True,
        batchnorm: BatchNormMode = "train",
        dropout: DropoutMode = "train",
        losses: Sequence[str] | None = None,
        pixel_range: float = 255.0,
        seed: int | None = None,
    ) -> None:
        if eps < 0 or alpha < 0 or pixel_range <= 0:
            raise ValueError(
                f"eps and alpha must not be negative and pixel_range must be positive, got eps={eps}, alpha={alpha}, "
                f"pixel_range={pixel_range}"
            )
        if norm != "linf" and attack != "pgd":
            raise ValueError(f"norm={norm!r} needs attack='pgd': single-step attacks here are l-inf")
        if begin < 0 or warmup < 0 or (end is not None and end <= begin):
            raise ValueError(f"the attack's window is empty: begin={begin}, end={end}, warmup={warmup}")
        self.eps, self.norm, self.losses, self.pixel_range, self.seed = eps, norm, losses, pixel_range, seed
        self.begin, self.end, self.warmup, self.by_epoch = begin, end, warmup, by_epoch
        self.batchnorm, self.dropout = batchnorm, dropout
        self.set_attack(attack, alpha=alpha, steps=steps, noise=noise)
        self.scale = 0.0
        self._switched = False
        self._armed = False
        self._attacking = False
        self._checked = False
        self._iter = 0
        self._runner: Runner | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def set_attack(self, attack: Attack, *, alpha: float, steps: int = 1, noise: float = 2.0) -> None:
        """Use another attack from the next iteration on; arguments as in the constructor.

        Raises:
            ValueError: for an unknown attack or fewer than one step.
        """
        if attack not in get_args(Attack):
            raise ValueError(f"attack must be one of {get_args(Attack)}, got {attack!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.attack, self.alpha, self.steps, self.noise = attack, alpha, steps, noise

    def switch(self, attack: Attack, *, alpha: float, steps: int = 1, noise: float = 2.0) -> None:
        """Like :meth:`set_attack` for a change in mid-run: it is kept in checkpoints and survives a resume."""
        self.set_attack(attack, alpha=alpha, steps=steps, noise=noise)
        self._switched = True

    # ---- schedule

    def before_train(self, runner: Runner) -> None:
        """Attach to the preprocessor (the model is wrapped and loaded by now)."""
        if self.by_epoch and not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise ValueError("AdversarialHook(by_epoch=True) needs an epoch-based loop: set by_epoch=False")
        self._detach()
        self._runner = runner
        self._checked = False
        preprocessor = unwrap(runner.model).data_preprocessor
        self._handle = preprocessor.register_forward_hook(self._on_preprocessed, with_kwargs=True)

    def after_train(self, runner: Runner) -> None:
        """Detach: nothing is attacked after training."""
        self._detach()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: DataBatch = None) -> None:
        """Set this iteration's eps and let the next training batch be attacked."""
        self._iter = runner.iter
        self.scale = self._scale_at(runner.iter, len(runner.train_dataloader) if self.by_epoch else 1)
        self._armed = True
        runner.message_hub.update_scalar("train/adv_eps", self.eps * self.scale)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: DataBatch = None, outputs: dict | None = None
    ) -> None:
        """Outside a training iteration nothing is attacked."""
        self._armed = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep an attack that was switched to in mid-run."""
        if self._switched:
            checkpoint[_STATE_KEY] = {
                "attack": self.attack,
                "alpha": self.alpha,
                "steps": self.steps,
                "noise": self.noise,
            }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """On resume, go on with the attack that was switched to; weights alone bring none."""
        if getattr(runner, "_resume", False) and _STATE_KEY in checkpoint:
            self.switch(**checkpoint[_STATE_KEY])

    def _scale_at(self, iteration: int, iterations_per_unit: int) -> float:
        begin, warmup = self.begin * iterations_per_unit, self.warmup * iterations_per_unit
        if iteration < begin or (self.end is not None and iteration >= self.end * iterations_per_unit):
            return 0.0
        return min(1.0, (iteration - begin + 1) / warmup) if warmup else 1.0

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._runner, self._armed = None, None, False

    # ---- attack

    def _on_preprocessed(self, preprocessor: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        # Plain models pass `training` by position, distributed wrappers by name.
        training = kwargs.get("training", args[1] if len(args) > 1 else False)
        if not (training and self._armed and self.scale > 0) or self._attacking:
            return None
        assert self._runner is not None, "attached only between before_train and after_train"
        raw = kwargs.get("data", args[0] if args else None)
        model = unwrap(self._runner.model)
        seed = self.seed if self.seed is not None else (self._runner.seed or 0)
        # Anew for each iteration, so that a resumed run needs no saved state.
        generator = seeded_generator(seed, get_rank(), self._iter, next(model.parameters()).device)
        with attack_mode(model, batchnorm=self.batchnorm, dropout=self.dropout):
            return {**output, "inputs": self.perturb(model, output, raw, generator=generator)}

    def perturb(
        self, model: nn.Module, data: dict[str, Any], raw: Any = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Attack one preprocessed batch with the settings in force; also what probes call.

        Args:
            model: unwrapped model, in the mode it should be attacked in.
            data: the preprocessor's output, with ``inputs`` of shape ``(N, C, H, W)``.
            raw: what went into the preprocessor (for the sizes of padded images).
            generator: source of the random start.

        Returns:
            The attacked inputs.

        Raises:
            ValueError: for inputs that are no floating-point image batch, or images that do not fit ``pixel_range``.
        """

        def attack(loss_fn: LossFn, x: Tensor, eps: Tensor, unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
            alpha = self.alpha * self.scale * unit
            if self.attack == "fgsm_rs":
                return fgsm_rs(loss_fn, x, eps=eps, alpha=alpha, low=low, high=high, generator=generator)
            if self.attack == "n_fgsm":
                return n_fgsm(
                    loss_fn, x, eps=eps, alpha=alpha, noise=self.noise, low=low, high=high, generator=generator
                )
            return pgd(
                loss_fn,
                x,
                eps=eps,
                alpha=alpha,
                steps=self.steps,
                low=low,
                high=high,
                norm=self.norm,
                generator=generator,
            )

        return self._in_pixel_units(attack, model, data, raw)

    def perturb_pgd(
        self,
        model: nn.Module,
        data: dict[str, Any],
        raw: Any = None,
        *,
        alpha: float,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """PGD at the eps in force, whatever the training attack is: a probe. Arguments as in :meth:`perturb`."""

        def attack(loss_fn: LossFn, x: Tensor, eps: Tensor, unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
            return pgd(
                loss_fn,
                x,
                eps=eps,
                alpha=alpha * unit,
                steps=steps,
                low=low,
                high=high,
                norm=self.norm,
                generator=generator,
            )

        return self._in_pixel_units(attack, model, data, raw)

    def _in_pixel_units(self, attack: Any, model: nn.Module, data: dict[str, Any], raw: Any) -> Tensor:
        inputs = data.get("inputs") if isinstance(data, dict) else None
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise ValueError(
                "AdversarialHook attacks one floating-point image batch, the preprocessor's output['inputs']; got "
                f"{type(inputs).__name__ if not isinstance(inputs, Tensor) else inputs.dtype}. Models with several "
                "inputs, and preprocessors that leave uint8 images, are not supported"
            )
        preprocessor: Any = model.data_preprocessor
        units = pixel_units(preprocessor, inputs, pixel_range=self.pixel_range)
        if not self._checked:
            check_pixel_range(inputs, units, self.pixel_range)
            self._checked = True
        raw_images = raw.get("inputs") if isinstance(raw, dict) else None
        area = image_area(inputs, data.get("data_samples"), raw_images)
        eps = self.eps * self.scale * units.unit
        if area is not None:
            eps = eps * area
        self._attacking = True
        try:
            # Under autocast small gradients would round to 0 in fp16, where the sign is lost.
            with torch.autocast(device_type=inputs.device.type, enabled=False):
                return attack(
                    training_loss(model, data, self.losses), inputs.float(), eps, units.unit, units.low, units.high
                )
        finally:
            self._attacking = False
