"""AdversarialHook: trains any mmengine model on attacked images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from mmitp.attacks import attack_mode, check_pixels, fgsm_rs, n_fgsm, pgd
from mmitp.attacks.arguments import Norm
from mmitp.attacks.gradient import LossFn
from mmitp.attacks.mode import BatchNormMode, DropoutMode, check_mode
from mmitp.engine.attack import (
    ImageBatch,
    PixelUnits,
    check_pixel_range,
    image_area,
    nonfinite_image,
    pixel_units,
    raw_images,
    samples_of,
    seeded_generator,
    training_loss,
    unwrap,
)
from mmitp.engine.finite import diverged
from mmitp.engine.window import RunLength
from mmitp.registry import HOOKS
from mmitp.values import is_count, is_number, unlike

Attack = Literal["fgsm_rs", "n_fgsm", "pgd"]
DataBatch = dict | tuple | list | None

_STATE_KEY = "mmitp_adversarial"

_DARK_BATCHES = 20
"""Batches that are all but black from the first on before the log says that pixel_range could not be checked."""


@HOOKS.register_module()
class AdversarialHook(Hook):
    """Replaces every training batch by its attacked version, behind the data preprocessor.

    The attack goes through the network as it stands (masks of a pruning run included), in float32 even under automatic
    mixed precision, and raises the model's own training loss. It is the published robust training (FGSM-RS, Wong et
    al. 2020) by default. Evaluation is never attacked. Nothing else is required of the model than ``mode="loss"``, and
    of its preprocessor that it hands out one batch of floating-point images, in a dict or a sequence, as a tensor or as
    a list of images of any sizes (:class:`~mmitp.engine.attack.ImageBatch`).

    Images from the data loader that hold NaN or infinite values end the run before it trains on them. A loss that is
    not finite under the attack gives no gradient: the log says so, and where the weights are not finite either, which
    no later step can mend, the run ends before they are saved.

    Args:
        eps: size of the attack in pixels/255 of the un-normalised image, whatever mean, std or channel order the
            preprocessor applies (``norm="l2"``: radius in the same unit), at most 255 (l-inf). The log warns of sizes
            that look like another unit's, see :func:`mmitp.attacks.check_pixels`.
        alpha: step, same unit, positive.
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
        on_diverged: called with the runner where loss and weights are not finite; says whether it has put finite
            weights back, so that the training may go on. :class:`CollapseGuardHook` takes this place if it restores.

    Raises:
        ValueError: for values that make no attack, and when training begins for a window that begins after its end.
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
        if not (is_number(pixel_range) and pixel_range > 0):
            raise ValueError(f"pixel_range, the value of full white, must be positive and finite, got {pixel_range!r}")
        if not (is_number(begin, 0) and is_number(warmup, 0) and (end is None or is_number(end) and end > begin)):
            raise ValueError(f"the attack's window is empty: begin={begin!r}, end={end!r}, warmup={warmup!r}")
        if not isinstance(by_epoch, bool):
            raise ValueError(f"by_epoch must be True or False, got {by_epoch!r}")
        if not (seed is None or is_count(seed, 0)):
            raise ValueError(f"seed must be a whole number of at least 0, or None for the runner's, got {seed!r}")
        if losses is not None and not (isinstance(losses, (list, tuple)) and losses and all(map(_is_pattern, losses))):
            raise ValueError(f"losses must be a list of at least one pattern, or None for all, got {losses!r}")
        check_mode(batchnorm, dropout)
        self.eps, self.norm, self.losses, self.pixel_range, self.seed = eps, norm, losses, pixel_range, seed
        self.begin, self.end, self.warmup, self.by_epoch = begin, end, warmup, by_epoch
        self.batchnorm, self.dropout = batchnorm, dropout
        self.set_attack(attack, alpha=alpha, steps=steps, noise=noise)
        self.scale = 0.0
        self._switched = False
        self._armed = False
        self._attacking = False
        self.on_diverged: Callable[[Runner], bool] | None = None
        self._fits = False
        self._dark = 0
        self._iter = 0
        self._finite: Tensor | None = None
        self._loss_finite: Tensor | None = None
        self._warned_loss = False
        self._runner: Runner | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def set_attack(self, attack: Attack, *, alpha: float, steps: int = 1, noise: float = 2.0) -> None:
        """Use another attack from the next iteration on; arguments as in the constructor.

        Raises:
            ValueError: as :meth:`check_attack`.
        """
        for doubt in self.check_attack(attack, alpha=alpha, steps=steps, noise=noise):
            print_log(f"AdversarialHook: {doubt}", logger="current", level=logging.WARNING)
        self.attack, self.alpha, self.steps, self.noise = attack, alpha, steps, noise

    def check_attack(self, attack: Attack, *, alpha: float, steps: int = 1, noise: float = 2.0) -> list[str]:
        """Whether :meth:`set_attack` would take these values; returns what is allowed but hardly meant.

        Raises:
            ValueError: for an unknown attack, a single-step attack in l2, fewer than one step, or sizes that make no
                attack.
        """
        if attack not in get_args(Attack):
            raise ValueError(f"attack must be one of {get_args(Attack)}, got {attack!r}")
        if self.norm != "linf" and attack != "pgd":
            raise ValueError(f"norm={self.norm!r} needs attack='pgd': single-step attacks here are l-inf")
        if alpha is None:
            raise ValueError(
                f"alpha, the length of a step of attack={attack!r}, must be a positive number of pixels/255, got None"
            )
        doubts = check_pixels(eps=self.eps, alpha=alpha, norm=self.norm, steps=steps, noise=noise)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return doubts if self.eps else [*doubts, "eps=0 attacks nothing: the images stay what they are"]

    def switch(self, attack: Attack, *, alpha: float, steps: int = 1, noise: float = 2.0) -> None:
        """Like :meth:`set_attack` for a change in mid-run: it is kept in checkpoints and survives a resume."""
        self.set_attack(attack, alpha=alpha, steps=steps, noise=noise)
        self._switched = True

    # ---- schedule

    def before_train(self, runner: Runner) -> None:
        """Attach to the preprocessor (the model is wrapped and loaded by now)."""
        self._detach()
        for told in self.check_length(RunLength.of(runner)):
            runner.logger.warning(told)
        self._check_others(runner)
        self._runner = runner
        # A guard may probe before the first iteration of a run that is resumed at the end of an epoch.
        self.scale = self._scale_at(runner.iter - 1, self._iterations(runner)) if runner.iter else 0.0
        self._fits, self._dark, self._finite = False, 0, None
        preprocessor = unwrap(runner.model).data_preprocessor
        self._handle = preprocessor.register_forward_hook(self._on_preprocessed, with_kwargs=True)

    def after_train(self, runner: Runner) -> None:
        """Detach: nothing is attacked after training."""
        self._detach()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: DataBatch = None) -> None:
        """Set this iteration's eps and let the next training batch be attacked."""
        self._iter = runner.iter
        self.scale = self._scale_at(runner.iter, self._iterations(runner))
        self._armed = True
        runner.message_hub.update_scalar("train/adv_eps", self.eps * self.scale)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: DataBatch = None, outputs: dict | None = None
    ) -> None:
        """Outside a training iteration nothing is attacked; look at what became of this one's attack."""
        self._armed = False
        if self._finite is None:
            return
        # No wait: the runner has read the step's losses by now, and so has waited for all that came before.
        images, loss = self._finite.tolist()
        self._finite = None
        if not images:
            raise ValueError(
                f"the attacked images of iteration {runner.iter + 1} hold NaN or infinite values, though those of the "
                "data loader do not: look at what the data preprocessor makes of them"
            )
        if not loss:
            self._on_nonfinite_loss(runner)
        self._warned_loss = not loss

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
            state, example = checkpoint[_STATE_KEY], dict(attack="", alpha=0.0, steps=1, noise=0.0)
            if problem := unlike(state, example, _STATE_KEY):
                raise ValueError(f"{runner._load_from}: {problem}")
            self.switch(**{key: state[key] for key in example})

    def check_length(self, run: RunLength) -> list[str]:
        """What is to be told of the attack's window in a run, a sentence each.

        Raises:
            ValueError: it begins after the run's end; ``by_epoch=True`` in a loop by iterations.
        """
        if self.by_epoch and not run.by_epoch:
            raise ValueError("AdversarialHook(by_epoch=True) needs an epoch-based loop: set by_epoch=False")
        length, unit = run.counted(self.by_epoch)
        if self.begin >= length:
            raise ValueError(
                f"AdversarialHook(begin={self.begin:g}) attacks nothing: the run ends after {length} {unit}, counted "
                "from 0. Set begin below that, or leave the hook out"
            )
        told = []
        close = length if self.end is None else min(self.end, length)
        if self.end is not None and self.end > length:
            told.append(f"AdversarialHook(end={self.end:g}): the run ends before, after {length} {unit}")
        if self.begin + self.warmup > close:
            told.append(
                f"AdversarialHook(begin={self.begin:g}, warmup={self.warmup:g}): the attack never reaches its full "
                f"size, since it ends at {close:g} {unit}"
            )
        return told

    def _check_others(self, runner: Runner) -> None:
        """Two hooks may follow each other, but not attack the same images."""
        for other in runner.hooks:
            if other is self or not isinstance(other, AdversarialHook):
                continue
            first, second = sorted([self, other], key=lambda hook: hook.begin)
            if self.by_epoch != other.by_epoch or first.end is None or first.end > second.begin:
                raise ValueError(
                    f"two AdversarialHooks attack at the same time (begin={first.begin:g}, end={first.end}; begin="
                    f"{second.begin:g}, end={second.end}), the one what the other has made: leave one out, or let one "
                    "begin where the other ends"
                )

    def _on_nonfinite_loss(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        broken = [name for name, value in model.state_dict(keep_vars=True).items() if bool(diverged(name, value))]
        if not broken:
            if not self._warned_loss:
                runner.logger.warning(
                    f"the loss under attack is not finite in iteration {runner.iter + 1}, so its gradient moved "
                    "nothing; the weights are finite still"
                )
            return
        if self.on_diverged is not None and self.on_diverged(runner):
            return
        raise ValueError(
            f"training has diverged: in iteration {runner.iter + 1} the loss under attack is not finite, and neither "
            f"are {len(broken)} of the model's tensors ({', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}). "
            "Nothing of this iteration was saved: resume from the last checkpoint with a lower learning rate, gradient "
            "clipping (optim_wrapper.clip_grad) or a smaller attack"
        )

    def _iterations(self, runner: Runner) -> int:
        """Of a unit of the window."""
        return len(runner.train_dataloader) if self.by_epoch else 1

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
        batch = ImageBatch.find(output)
        broken = nonfinite_image(raw_images(raw, batch.key))
        if broken is not None:
            raise ValueError(
                f"image {broken} of the batch of iteration {self._iter + 1} holds NaN or infinite values, as the data "
                f"loader gives it{_where(samples_of(output), broken)}. Training on it would ruin the weights: look at "
                "the data set's file and its pipeline"
            )
        model = unwrap(self._runner.model)
        seed = self.seed if self.seed is not None else (self._runner.seed or 0)
        # Anew for each iteration, so that a resumed run needs no saved state.
        generator = seeded_generator(seed, get_rank(), self._iter, next(model.parameters()).device)
        with attack_mode(model, batchnorm=self.batchnorm, dropout=self.dropout):
            attacked = self.perturb(model, output, raw, generator=generator)
        assert self._loss_finite is not None
        finite = torch.stack([torch.isfinite(ImageBatch.find(attacked).images).all(), self._loss_finite])
        self._finite = finite if self._finite is None else self._finite & finite
        return attacked

    def perturb(self, model: nn.Module, data: Any, raw: Any = None, *, generator: torch.Generator | None = None) -> Any:
        """Attack one preprocessed batch with the settings in force; also what probes call.

        Args:
            model: unwrapped model, in the mode it should be attacked in.
            data: the preprocessor's output, see :class:`~mmitp.engine.attack.ImageBatch`.
            raw: what went into the preprocessor (for the sizes of padded images).
            generator: source of the random start.

        Returns:
            The batch with attacked images.

        Raises:
            ValueError: for data without a batch of floating-point images, or images that do not fit ``pixel_range``.
        """

        def attack(loss_fn: LossFn, x: Tensor, eps: Tensor, unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
            common: dict[str, Any] = dict(
                eps=eps,
                alpha=self.alpha * self.scale * unit,
                low=low,
                high=high,
                generator=generator,
                check=False,
            )
            if self.attack == "fgsm_rs":
                return fgsm_rs(loss_fn, x, **common)
            if self.attack == "n_fgsm":
                return n_fgsm(loss_fn, x, noise=self.noise, **common)
            return pgd(loss_fn, x, steps=self.steps, norm=self.norm, **common)

        return self._in_pixel_units(attack, model, data, raw)

    def perturb_pgd(
        self,
        model: nn.Module,
        data: Any,
        raw: Any = None,
        *,
        alpha: float,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> Any:
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
                check=False,
            )

        return self._in_pixel_units(attack, model, data, raw)

    def _in_pixel_units(self, attack: Any, model: nn.Module, data: Any, raw: Any) -> Any:
        batch = ImageBatch.find(data)
        images = batch.precise()
        preprocessor: Any = model.data_preprocessor
        # Sizes were checked when they were set, and the image box is here: nothing is left for each step to check.
        units = pixel_units(preprocessor, images, pixel_range=self.pixel_range)
        if batch.sizes is not None:
            area = image_area(images, None, data[batch.key])
        else:
            area = image_area(images, samples_of(data), raw_images(raw, batch.key))
        if not self._fits:
            self._check_pixel_range(images, units, area)
        eps = self.eps * self.scale * units.unit
        if area is not None:
            eps = eps * area
        loss_fn = training_loss(model, data, self.losses)
        self._loss_finite = None

        def watched(x: Tensor) -> Tensor:
            loss = loss_fn(x)
            finite = torch.isfinite(loss.detach()).all()
            self._loss_finite = finite if self._loss_finite is None else self._loss_finite & finite
            return loss

        self._attacking = True
        try:
            # Under autocast small gradients would round to 0 in fp16, where the sign is lost.
            with torch.autocast(device_type=images.device.type, enabled=False):
                return batch.replaced(attack(watched, images, eps, units.unit, units.low, units.high))
        finally:
            self._attacking = False

    def _check_pixel_range(self, images: Tensor, units: PixelUnits, area: Tensor | None) -> None:
        self._fits = check_pixel_range(images, units, self.pixel_range, area)
        self._dark += not self._fits
        if self._dark == _DARK_BATCHES:
            print_log(
                f"AdversarialHook: the first {self._dark} batches are all but black, so pixel_range="
                f"{self.pixel_range:g} could not be checked",
                logger="current",
                level=logging.WARNING,
            )


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _where(samples: Sequence[Any] | None, index: int) -> str:
    path = getattr(samples[index], "metainfo", {}).get("img_path") if samples else None
    return f" ({path})" if path else ""
