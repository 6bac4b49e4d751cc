"""Gradient attacks on a batch: one step (FGSM-RS, N-FGSM), many steps (PGD), and the GradAlign regulariser.

Every function takes a ``loss_fn`` that maps a batch to one loss a sample (shape ``(N,)``) or to a scalar, and *raises*
it. All quantities are in the units of ``x``, whatever they are; ``eps``, ``alpha``, ``low`` and ``high`` are numbers or
tensors that broadcast against ``x``, so a normalised image takes ``eps / std`` per channel, and an ``eps`` that is zero
over the padding leaves the padding alone.

What holds for every result, in float32 and without tolerance unless said:

- Values that make no attack are refused, on every device, see :func:`mmitp.attacks.check_arguments`. Tensors on an
  accelerator have to be waited for; a training step that has checked its values says ``check=False``.
- ``low <= x_adv <= high``. Where ``x`` itself lies outside the box (an augmentation that does not clip), the box is
  widened to include ``x`` there: an attack never moves a value further out, and never has to move it back.
- ``|x_adv - x| <= eps`` (for N-FGSM ``noise * eps + alpha``), up to the rounding of one addition: one unit in the
  last place of the larger of ``|x|`` and ``|x_adv|``. Where ``eps`` is 0, ``x_adv`` equals ``x`` exactly.
- Parameters' ``.grad`` is untouched: gradients are taken with :func:`torch.autograd.grad` for the input only.
- The result carries no graph, and is the same for the same generator state.

Buffers such as BatchNorm's running statistics are the model's business: see :func:`mmitp.attacks.attack_mode`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmitp.attacks.arguments import Amount, Norm, check_arguments

LossFn = Callable[[Tensor], Tensor]


def fgsm_rs(
    loss_fn: LossFn,
    x: Tensor,
    *,
    eps: Amount,
    alpha: Amount,
    low: Amount = 0.0,
    high: Amount = 1.0,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> Tensor:
    """One signed gradient step from a random start (FGSM-RS; Wong et al. 2020, "Fast is better than free").

    ``delta ~ U(-eps, eps)``, ``delta <- clamp(delta + alpha * sign(grad), -eps, eps)``, ``x_adv = clamp(x + delta,
    low, high)``. As in the authors' code the starting point is already clamped to the box.

    Args:
        loss_fn: the loss to raise, from a batch shaped like ``x``.
        x: clean batch, ``(N, ...)``, floating point.
        eps: largest change of a value.
        alpha: step; the published setting is ``1.25 * eps``. More of it invites catastrophic overfitting.
        low: smallest allowed value.
        high: largest allowed value.
        generator: source of the random start; a CPU generator also serves a CUDA batch.
        check: whether the sizes are checked; ``False`` where the caller has.

    Returns:
        The adversarial batch, shaped like ``x``, detached.

    Raises:
        ValueError: as :func:`mmitp.attacks.check_arguments`.
    """
    if check:
        check_arguments(eps=eps, alpha=alpha, low=low, high=high)
    clean, eps, alpha, low, high = _prepare(x, eps, alpha, low, high)
    floor, ceiling = torch.maximum(clean - eps, low), torch.minimum(clean + eps, high)
    start = (clean + _uniform(clean, generator) * eps).clamp(floor, ceiling)
    return (start + alpha * input_gradient(loss_fn, start).sign()).clamp(floor, ceiling)


def n_fgsm(
    loss_fn: LossFn,
    x: Tensor,
    *,
    eps: Amount,
    alpha: Amount | None = None,
    noise: float = 2.0,
    low: Amount = 0.0,
    high: Amount = 1.0,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> Tensor:
    """One step from stronger noise, without clipping to the eps ball (N-FGSM; de Jorge et al. 2022, "Make some noise").

    ``eta ~ U(-noise * eps, noise * eps)``, ``x' = clamp(x + eta, low, high)``, ``x_adv = clamp(x' + alpha *
    sign(grad(x')), low, high)``: the authors' remedy against catastrophic overfitting, at the price of one FGSM step.
    As in their code the noisy image is clamped to the box *before* the gradient is taken, so that the network never
    sees a value no image has, and a step away from the edge starts at the edge. Hence ``|x_adv - x| <= noise * eps +
    alpha``: it is a training attack, not one to report figures with.

    Args:
        loss_fn: the loss to raise.
        x: clean batch, ``(N, ...)``.
        eps: size of the threat the model should withstand.
        alpha: step; ``None`` takes ``eps`` as the paper does.
        noise: the paper's ``k``, noise magnitude in multiples of ``eps`` (its default 2).
        low: smallest allowed value.
        high: largest allowed value.
        generator: source of the noise.
        check: whether the sizes are checked; ``False`` where the caller has.

    Returns:
        The augmented batch, shaped like ``x``, detached.

    Raises:
        ValueError: as :func:`mmitp.attacks.check_arguments`.
    """
    alpha = eps if alpha is None else alpha
    if check:
        check_arguments(eps=eps, alpha=alpha, low=low, high=high, noise=noise)
    clean, eps, alpha, low, high = _prepare(x, eps, alpha, low, high)
    # alpha moves nothing where the threat is zero (padding), though the step is not clipped by eps elsewhere.
    alpha = torch.where(eps > 0, alpha, torch.zeros_like(alpha))
    start = (clean + _uniform(clean, generator) * (noise * eps)).clamp(low, high)
    reach = noise * eps + alpha
    stepped = start + alpha * input_gradient(loss_fn, start).sign()
    return stepped.clamp(torch.maximum(clean - reach, low), torch.minimum(clean + reach, high))


def pgd(
    loss_fn: LossFn,
    x: Tensor,
    *,
    eps: Amount,
    alpha: Amount,
    steps: int,
    restarts: int = 1,
    random_start: bool = True,
    low: Amount = 0.0,
    high: Amount = 1.0,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
    check: bool = True,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018), each sample's worst of ``restarts`` runs.

    For ``norm="l2"`` the ball is ``||delta / eps|| <= 1`` over a sample: the usual one of radius ``eps`` for a number,
    and for a tensor the ellipsoid with those half-axes, which is the round ball of pixel space seen in units normalised
    per channel. The step has length ``alpha`` along the steepest ascent; a tensor ``alpha`` is proportional to ``eps``.

    Args:
        loss_fn: the loss to raise. With more than one restart it is also what picks the worst run: a loss a sample
            picks for each sample, a scalar loss picks for the whole batch at once.
        x: clean batch, ``(N, ...)``.
        eps: radius of the ball.
        alpha: step.
        steps: gradient steps a run; 0 returns the (random) starting point.
        restarts: runs, each from its own random start. Under one generator seed, ``restarts=k`` tries the very
            starts of ``restarts=k - 1`` and one more, so the loss reached never falls with it (if ``loss_fn`` itself is
            deterministic). A run that ends at a NaN loss counts only where all do.
        random_start: start from a uniform draw of the ball; else from ``x``.
        low: smallest allowed value.
        high: largest allowed value.
        norm: ``"linf"`` or ``"l2"``.
        generator: source of the random starts.
        check: whether sizes and counts are checked; ``False`` where the caller has.

    Returns:
        The adversarial batch, shaped like ``x``, detached.

    Raises:
        ValueError: as :func:`mmitp.attacks.check_arguments`; so several restarts without a random start, which would
            repeat one run.
    """
    if check:
        check_arguments(
            eps=eps,
            alpha=alpha,
            low=low,
            high=high,
            steps=steps,
            restarts=restarts,
            random_start=random_start,
            norm=norm,
        )
    clean, eps, alpha, low, high = _prepare(x, eps, alpha, low, high)
    run = _pgd_linf if norm == "linf" else _pgd_l2
    worst = run(loss_fn, clean, eps, alpha, steps, random_start, low, high, generator)
    if restarts == 1:
        return worst
    worst_loss = _ranked(evaluate_loss(loss_fn, worst))
    for _ in range(restarts - 1):
        candidate = run(loss_fn, clean, eps, alpha, steps, random_start, low, high, generator)
        loss = _ranked(evaluate_loss(loss_fn, candidate))
        better = loss > worst_loss
        worst_loss = torch.where(better, loss, worst_loss)
        worst = torch.where(_per_sample(better, clean), candidate, worst)
    return worst


def grad_align(
    loss_fn: LossFn,
    x: Tensor,
    *,
    eps: Amount,
    generator: torch.Generator | None = None,
    noise_only: bool = False,
    check: bool = True,
) -> Tensor:
    """GradAlign regulariser (Andriushchenko & Flammarion 2020): how far the loss is from linear inside the ball.

    ``1 - mean_i cos(grad_i(x), grad_i(x + U(-eps, eps)))``, 0 for a loss linear in ``x``. It is differentiable in the
    model's parameters (a second derivative): add it, weighted, to the training loss. It costs about two more passes.

    Args:
        loss_fn: the training loss, one a sample or a scalar.
        x: clean batch, ``(N, ...)``.
        eps: half-width of the uniform noise.
        generator: source of the noise.
        noise_only: treat the gradient at ``x`` as a constant, as the authors' cheaper variant does.
        check: whether ``eps`` is checked; ``False`` where the caller has.

    Returns:
        A scalar between 0 and 2, with graph.

    Raises:
        ValueError: as :func:`mmitp.attacks.check_arguments`.
    """
    if check:
        check_arguments(eps=eps)
    _require_floating(x)
    clean = x.detach()
    noisy = clean + _uniform(clean, generator) * torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        here = _gradient(loss_fn, clean.requires_grad_(True), create_graph=not noise_only).flatten(1)
        there = _gradient(loss_fn, noisy.requires_grad_(True), create_graph=True).flatten(1)
        return 1.0 - torch.nn.functional.cosine_similarity(here, there, dim=1, eps=1e-12).mean()


def input_gradient(loss_fn: LossFn, x: Tensor) -> Tensor:
    """Gradient of the (summed) loss with respect to ``x``, detached and finite.

    NaN, which points nowhere, becomes 0; an infinite value becomes the largest finite one of its sign.

    Works under ``no_grad`` and ``inference_mode`` alike and leaves parameters' ``.grad`` alone.

    Raises:
        ValueError: if the loss is neither ``(N,)`` nor a scalar, or does not depend on ``x``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # A clone made here is an ordinary tensor even if x was born in inference mode.
        return _gradient(loss_fn, x.detach().clone().requires_grad_(True)).nan_to_num(nan=0.0)


def evaluate_loss(loss_fn: LossFn, x: Tensor) -> Tensor:
    """The loss at ``x``, ``(N,)`` or scalar, without a graph."""
    with torch.no_grad():
        return _checked(loss_fn(x), x).detach()


def _gradient(loss_fn: LossFn, x: Tensor, create_graph: bool = False) -> Tensor:
    loss = _checked(loss_fn(x), x)
    if not loss.requires_grad:
        raise ValueError(
            "the attack's loss does not depend on the input: loss_fn must not detach it, run under no_grad, or go "
            "through a non-differentiable operation"
        )
    return torch.autograd.grad(loss.sum(), x, create_graph=create_graph)[0]


def _require_floating(x: Tensor) -> None:
    """Refuses a batch that has no gradient.

    Raises:
        ValueError: with its type.
    """
    if not x.is_floating_point():
        raise ValueError(f"the attacked batch must be floating point, got {x.dtype}: normalise the images first")


def _checked(loss: Tensor, x: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.dim() > 1 or (loss.dim() == 1 and loss.shape[0] != x.shape[0]):
        raise ValueError(
            f"loss_fn must return one loss a sample, shape ({x.shape[0]},), or a scalar; got shape {tuple(loss.shape)}"
        )
    return loss


def _prepare(
    x: Tensor, eps: Amount, alpha: Amount, low: Amount, high: Amount
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _require_floating(x)
    clean = x.detach()
    amounts = [torch.as_tensor(value, dtype=x.dtype, device=x.device).detach() for value in (eps, alpha, low, high)]
    eps, alpha, low, high = amounts
    return clean, eps, alpha, torch.minimum(low, clean), torch.maximum(high, clean)


def _ranked(loss: Tensor) -> Tensor:
    """NaN, which compares with nothing, ranks below every loss."""
    return torch.where(loss.isnan(), torch.full_like(loss, -torch.inf), loss)


def _uniform(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return _random(torch.rand, x.shape, x, generator).mul_(2.0).sub_(1.0)


def _random(
    draw: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw on the generator's own device (torch refuses another), then move to that of ``like``."""
    device = like.device if generator is None else generator.device
    return draw(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Reshape ``(N,)`` to broadcast over ``x``; a scalar stays one."""
    return value.reshape(-1, *[1] * (x.dim() - 1)) if value.dim() else value


def _pgd_linf(
    loss_fn: LossFn,
    x: Tensor,
    eps: Tensor,
    alpha: Tensor,
    steps: int,
    random_start: bool,
    low: Tensor,
    high: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    floor, ceiling = torch.maximum(x - eps, low), torch.minimum(x + eps, high)
    adv = x.clone()
    if random_start:
        adv = (x + _uniform(x, generator) * eps).clamp(floor, ceiling)
    for _ in range(steps):
        adv = (adv + alpha * input_gradient(loss_fn, adv).sign()).clamp(floor, ceiling)
    return adv


def _pgd_l2(
    loss_fn: LossFn,
    x: Tensor,
    eps: Tensor,
    alpha: Tensor,
    steps: int,
    random_start: bool,
    low: Tensor,
    high: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    # Work in u = delta / eps, where the ball is the unit ball; values with eps = 0 do not take part.
    live = (eps > 0).expand_as(x)
    divisor = torch.where(live, eps, torch.ones_like(eps))
    ratio = torch.where(live, alpha / divisor, torch.zeros_like(x))
    delta = torch.zeros_like(x)
    if random_start:
        direction = _random(torch.randn, x.shape, x, generator) * live
        dimensions = live.flatten(1).sum(1).clamp(min=1).to(x.dtype)
        radius = _random(torch.rand, (x.shape[0],), x, generator) ** (1.0 / dimensions)
        delta = eps * _unit(direction) * _per_sample(radius, x)
        delta = (x + delta).clamp(low, high) - x
    for _ in range(steps):
        # Scaled before eps multiplies it: the largest finite gradient, which stands for an infinite one, overflows.
        ascent = _unit(_peak(input_gradient(loss_fn, x + delta)) * eps)
        u = torch.where(live, delta / divisor, torch.zeros_like(x)) + ratio * ascent
        u = u / _per_sample(u.flatten(1).norm(dim=1).clamp(min=1.0), x)
        delta = (x + eps * u).clamp(low, high) - x
    # Clamped once more: (x + (y - x)) may round past the box that y obeyed.
    return torch.where(live, (x + delta).clamp(low, high), x)


def _unit(value: Tensor) -> Tensor:
    """Each sample scaled to l2 norm 1; an all-zero sample stays zero. Scaled twice, so that tiny gradients survive."""
    value = _peak(value)
    return value / _per_sample(value.flatten(1).norm(dim=1).clamp(min=torch.finfo(value.dtype).tiny), value)


def _peak(value: Tensor) -> Tensor:
    """Each sample scaled so that its largest value is 1; an all-zero sample stays zero."""
    return value / _per_sample(value.flatten(1).abs().amax(1).clamp(min=torch.finfo(value.dtype).tiny), value)
