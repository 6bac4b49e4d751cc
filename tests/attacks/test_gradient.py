"""Invariants and hand-derived cases of the gradient attacks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmitp.attacks import cross_entropy, evaluate_loss, fgsm_rs, grad_align, input_gradient, margin, n_fgsm, pgd

MEAN = torch.tensor([0.49, 0.48, 0.44]).view(1, 3, 1, 1)
STD = torch.tensor([0.25, 0.24, 0.26]).view(1, 3, 1, 1)
ATTACKS = {
    "fgsm_rs": lambda loss, x, eps, **kw: fgsm_rs(loss, x, eps=eps, alpha=1.25 * eps, **kw),
    "n_fgsm": lambda loss, x, eps, **kw: n_fgsm(loss, x, eps=eps, **kw),
    "pgd_linf": lambda loss, x, eps, **kw: pgd(loss, x, eps=eps, alpha=eps / 3, steps=3, **kw),
    "pgd_restarts": lambda loss, x, eps, **kw: pgd(loss, x, eps=eps, alpha=eps / 2, steps=2, restarts=2, **kw),
    "pgd_l2": lambda loss, x, eps, **kw: pgd(loss, x, eps=eps, alpha=eps / 3, steps=3, norm="l2", **kw),
}
# How far each may go, in multiples of eps, in the largest single value.
REACH = {"fgsm_rs": 1.0, "n_fgsm": 3.0, "pgd_linf": 1.0, "pgd_restarts": 1.0, "pgd_l2": 1.0}

every_attack = pytest.mark.parametrize("name", sorted(ATTACKS))
quick = settings(max_examples=25, deadline=None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_net(seed: int = 0, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, classes))


def make_batch(seed: int = 0, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    return torch.rand(n, 3, 6, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def within(x_adv: torch.Tensor, x: torch.Tensor, reach: torch.Tensor) -> bool:
    """|x_adv - x| <= reach, up to one unit in the last place of the larger operand (compared in float64)."""
    bigger = torch.maximum(x_adv.abs(), x.abs())
    ulp = torch.nextafter(bigger, torch.tensor(torch.inf)) - bigger
    return bool(((x_adv.double() - x.double()).abs() <= reach.double() + ulp.double()).all())


@every_attack
@quick
@given(
    seed=st.integers(0, 2**16),
    eps=st.floats(0.0, 0.5, width=32, allow_subnormal=False),
    scale=st.sampled_from([1.0, 255.0]),
)
def test_stays_in_the_ball_and_in_the_box(name: str, seed: int, eps: float, scale: float) -> None:
    """In [0, 1] and in 0..255 units, per channel normalised."""
    x, y = make_batch(seed)
    low, high = (0 - MEAN) / STD * scale, (1 - MEAN) / STD * scale
    x = (x - MEAN) / STD * scale
    amount = eps / STD * scale
    x_adv = ATTACKS[name](
        cross_entropy(make_net(), y), x, amount, low=low, high=high, generator=seeded(seed)
    )  # fmt: skip
    assert (x_adv >= torch.minimum(low, x)).all()
    assert (x_adv <= torch.maximum(high, x)).all()
    assert within(x_adv, x, REACH[name] * amount.expand_as(x))
    assert not x_adv.requires_grad


@every_attack
@quick
@given(seed=st.integers(0, 2**16))
def test_eps_zero_returns_the_clean_batch_exactly(name: str, seed: int) -> None:
    x, y = make_batch(seed)
    x = (x - 0.5) * 3  # partly outside the box [0, 1]: an attack has no business there either
    assert torch.equal(ATTACKS[name](cross_entropy(make_net(), y), x, 0.0, generator=seeded(seed)), x)


@every_attack
@quick
@given(seed=st.integers(0, 2**16), height=st.integers(0, 6), width=st.integers(0, 6))
def test_padding_with_eps_zero_is_untouched(name: str, seed: int, height: int, width: int) -> None:
    x, y = make_batch(seed)
    inside = torch.zeros(3, 1, 6, 6)
    inside[0, :, :height, :width] = 1
    inside[1:] = 1
    x = torch.where(inside.bool(), x, torch.tensor(114.0))  # YOLOX pads far outside the normalised box
    x_adv = ATTACKS[name](cross_entropy(make_net(), y), x, 0.1 * inside, generator=seeded(seed))
    outside = (inside == 0).expand_as(x)
    assert torch.equal(x_adv[outside], x[outside])
    assert not torch.equal(x_adv[1:], x[1:])


@every_attack
def test_values_outside_the_box_move_only_towards_it(name: str) -> None:
    x, y = make_batch(1)
    x = x * 2 - 0.5
    x_adv = ATTACKS[name](cross_entropy(make_net(), y), x, 0.1, generator=seeded(0))
    assert (x_adv[x > 1] <= x[x > 1]).all()
    assert (x_adv[x < 0] >= x[x < 0]).all()
    assert within(x_adv, x, torch.full_like(x, 0.1 * REACH[name]))


@every_attack
def test_same_generator_state_same_result_and_global_state_untouched(name: str) -> None:
    x, y = make_batch(2)
    loss = cross_entropy(make_net(), y)
    state = torch.get_rng_state()
    first, again, other = (ATTACKS[name](loss, x, 0.1, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@every_attack
def test_parameters_gradients_are_untouched(name: str) -> None:
    x, y = make_batch(3)
    net = make_net()
    first, *rest = net.parameters()
    first.grad = torch.full_like(first, 7.0)
    ATTACKS[name](cross_entropy(net, y), x, 0.1)
    assert (first.grad == 7.0).all()
    assert all(parameter.grad is None for parameter in rest)


@every_attack
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(name: str, context: type) -> None:
    x, y = make_batch(4)
    net = make_net()
    expected = ATTACKS[name](cross_entropy(net, y), x, 0.1, generator=seeded(0))
    with context():
        actual = ATTACKS[name](cross_entropy(net, y), x.clone(), 0.1, generator=seeded(0))
    assert torch.equal(actual, expected)


def test_fgsm_rs_on_a_linear_loss_reaches_the_right_corner() -> None:
    """alpha = 2 eps crosses the ball from any start, so delta = eps * sign(w) wherever w is not 0."""
    w = torch.tensor([[1.0, -3.0, 0.0, 2.0]])
    x = torch.tensor([[0.5, 0.5, 0.5, 0.95]])
    x_adv = fgsm_rs(lambda v: (v * w).sum(1), x, eps=0.125, alpha=0.25, generator=seeded(0))
    assert x_adv[0, [0, 1, 3]].tolist() == [0.625, 0.375, 1.0]  # the last is stopped by the box
    assert 0.375 <= x_adv[0, 2] <= 0.625
    assert x_adv[0, 2] != 0.5  # no gradient: the random start remains


def test_n_fgsm_on_a_linear_loss_is_noise_plus_a_full_step_without_clipping() -> None:
    w = torch.tensor([[1.0, -1.0]])
    x = torch.full((500, 2), 0.5)
    delta = n_fgsm(lambda v: (v * w).sum(1), x, eps=0.0625, generator=seeded(0)) - x
    noise = delta - 0.0625 * w
    assert noise.abs().max() <= 0.125 + 1e-6
    assert noise.abs().max() > 0.12  # uniform on (-2 eps, 2 eps), so that ...
    assert delta.abs().max() > 0.18  # ... delta nearly reaches 3 eps
    assert noise.mean().abs() < 0.01


def test_n_fgsm_clamps_the_noisy_image_to_the_box_before_the_gradient_as_its_authors_do() -> None:
    """Black under noise d = -2 eps .. 2 eps is seen at max(d, 0) and ends one eps further; unclamped it would be seen
    at d, and a step up from d < -eps would end at 0."""
    x, eps = torch.zeros(1, 400), 0.0625
    eta = (torch.rand((1, 400), generator=seeded(1)) * 2 - 1) * (2 * eps)
    seen: list[torch.Tensor] = []

    def loss(v: torch.Tensor) -> torch.Tensor:
        seen.append(v.detach())
        return v.sum(1)

    x_adv = n_fgsm(loss, x, eps=eps, generator=seeded(1))
    assert seen[0].min() == 0
    torch.testing.assert_close(seen[0], eta.clamp(min=0), atol=1e-7, rtol=0)
    torch.testing.assert_close(x_adv, eta.clamp(min=0) + eps, atol=1e-7, rtol=0)
    assert (eta < -eps).any()


def published_n_fgsm(
    loss_fn: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    eps: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    draw: torch.Tensor,
) -> torch.Tensor:
    """The steps of the authors' training loop, on a perturbation, as their paper's code takes them."""
    eta = torch.min(torch.max(draw * 2 * eps, low - x), high - x).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_fn(x + eta).sum(), eta)
    delta = (eta + eps * gradient.sign()).detach()
    return x + torch.min(torch.max(delta, low - x), high - x)


@quick
@given(seed=st.integers(0, 2**16))
def test_n_fgsm_agrees_with_the_published_algorithm(seed: int) -> None:
    """A third of the values black or white, normalised per channel as theirs are."""
    x, y = make_batch(seed)
    low, high, eps = (0 - MEAN) / STD, (1 - MEAN) / STD, 16 / 255 / STD
    x = ((x * 1.6 - 0.3).clamp(0, 1) - MEAN) / STD
    loss = cross_entropy(make_net(), y)
    draw = torch.rand(x.shape, generator=seeded(seed)) * 2 - 1
    ours = n_fgsm(loss, x, eps=eps, low=low, high=high, generator=seeded(seed))
    agree = (ours - published_n_fgsm(loss, x, eps, low, high, draw)).abs() < 1e-5
    # (x + eta and the sum clamped differ by rounding, which may turn the sign of a gradient of next to nothing.)
    assert agree.float().mean() > 0.999


def test_pgd_linf_without_random_start_walks_alpha_a_step_until_the_ball_ends() -> None:
    w = torch.tensor([[1.0, -1.0]])
    x = torch.tensor([[0.5, 0.5]])
    loss = lambda v: (v * w).sum(1)  # noqa: E731
    kwargs = {"eps": 0.25, "alpha": 0.0625, "random_start": False}
    assert pgd(loss, x, steps=0, **kwargs).tolist() == [[0.5, 0.5]]
    assert pgd(loss, x, steps=3, **kwargs).tolist() == [[0.6875, 0.3125]]
    assert pgd(loss, x, steps=9, **kwargs).tolist() == [[0.75, 0.25]]


def test_pgd_l2_on_a_linear_loss_goes_along_the_gradient_to_the_sphere() -> None:
    """w = (3, 4): one step of 0.05 gives (0.03, 0.04); many end at eps * w / |w| = (0.06, 0.08)."""
    w = torch.tensor([[3.0, 4.0]])
    x = torch.full((1, 2), 0.5)
    kwargs = {"eps": 0.1, "alpha": 0.05, "random_start": False, "norm": "l2"}
    torch.testing.assert_close(pgd(lambda v: (v * w).sum(1), x, steps=1, **kwargs), torch.tensor([[0.53, 0.54]]))
    torch.testing.assert_close(pgd(lambda v: (v * w).sum(1), x, steps=9, **kwargs), torch.tensor([[0.56, 0.58]]))


def test_pgd_l2_survives_gradients_whose_squares_underflow() -> None:
    x_adv = pgd(
        lambda v: (v * torch.tensor([3e-30, 4e-30])).sum(1),
        torch.full((1, 2), 0.5),
        eps=0.1,
        alpha=0.1,
        steps=1,
        random_start=False,
        norm="l2",
    )
    torch.testing.assert_close(x_adv, torch.tensor([[0.56, 0.58]]))


@pytest.mark.parametrize("eps", [0.5, 2.2, 300.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_infinite_gradient_takes_its_own_sample_along_its_axis_and_leaves_the_others_alone(
    norm: str, eps: float
) -> None:
    """Value 0 of sample 0 has an infinite slope, so the steepest ascent is along it; sample 1 goes along (3, 4)."""

    def loss(v: torch.Tensor) -> torch.Tensor:
        slope = torch.tensor([[torch.inf, 4.0], [3.0, 4.0]])
        return _Slope.apply(v, slope)

    x = torch.zeros(2, 2)
    x_adv = pgd(loss, x, eps=eps, alpha=eps, steps=2, norm=norm, random_start=False, low=-1e3, high=1e3)
    expected = [[1, 0], [0.6, 0.8]] if norm == "l2" else [[1, 1], [1, 1]]
    torch.testing.assert_close(x_adv, torch.tensor(expected) * eps)


class _Slope(torch.autograd.Function):
    """A loss a sample whose gradient is given."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slope)
        return value.sum(1)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * grad[0][:, None], None


def test_pgd_l2_leaves_a_sample_of_nan_gradients_at_its_start() -> None:
    slope = torch.tensor([[torch.nan, torch.nan], [3.0, 4.0]])
    kwargs: dict[str, Any] = {"eps": 2.0, "alpha": 2.0, "steps": 2, "norm": "l2", "random_start": False, "high": 9.0}
    x_adv = pgd(lambda v: _Slope.apply(v, slope), torch.zeros(2, 2), **kwargs)
    torch.testing.assert_close(x_adv, torch.tensor([[0.0, 0.0], [1.2, 1.6]]))


def test_a_run_that_ends_at_a_nan_loss_gives_way_to_any_other() -> None:
    """The first of the runs' losses is NaN for sample 0; the second run must take its place there."""
    losses = iter([torch.tensor([torch.nan, 1.0]), torch.tensor([-5.0, 0.5])])
    x, starts = torch.full((2, 3), 0.5), [torch.rand((2, 3), generator=g) for g in [seeded(0)] * 2]
    kept = pgd(lambda v: next(losses), x, eps=0.25, alpha=0.1, steps=0, restarts=2, generator=seeded(0))
    runs = [0.5 + (draw * 2 - 1) * 0.25 for draw in starts]
    torch.testing.assert_close(kept, torch.stack([runs[1][0], runs[0][1]]))


@quick
@given(seed=st.integers(0, 2**16), eps=st.floats(0.015625, 4.0, width=32), alpha=st.floats(0.015625, 9.0, width=32))
def test_pgd_l2_projects_each_sample_onto_its_own_ball(seed: int, eps: float, alpha: float) -> None:
    x, y = make_batch(seed)
    loss = cross_entropy(make_net(), y)
    x_adv = pgd(loss, x, eps=eps, alpha=alpha, steps=2, norm="l2", generator=seeded(seed))
    assert ((x_adv - x).flatten(1).norm(dim=1) <= eps * (1 + 1e-5)).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


def test_pgd_l2_starts_anywhere_in_the_ball() -> None:
    """Uniformly: in two dimensions a quarter of the starts lies within half of the radius."""
    x = torch.zeros(4000, 1, 1, 2)
    start = pgd(lambda v: v.sum(), x, eps=0.5, alpha=0.1, steps=0, norm="l2", low=-9, high=9, generator=seeded(0))
    lengths = start.flatten(1).norm(dim=1)
    assert lengths.max() <= 0.5 * (1 + 1e-6)
    assert (lengths < 0.25).float().mean() == pytest.approx(0.25, abs=0.03)
    assert start.flatten(1).mean(0).abs().max() < 0.02


def test_pgd_l2_in_normalised_units_is_the_pixel_attack() -> None:
    """eps / std per channel describes the round ball of pixel space."""
    x, y = make_batch(5)
    net = make_net()
    pixel = pgd(
        cross_entropy(lambda v: net((v - MEAN) / STD), y), x, eps=0.7, alpha=0.3, steps=4, norm="l2", random_start=False
    )
    normalised = pgd(
        cross_entropy(net, y),
        (x - MEAN) / STD,
        eps=0.7 / STD,
        alpha=0.3 / STD,
        steps=4,
        norm="l2",
        random_start=False,
        low=(0 - MEAN) / STD,
        high=(1 - MEAN) / STD,
    )
    torch.testing.assert_close(normalised * STD + MEAN, pixel, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_restarts_never_lower_any_samples_loss(norm: str) -> None:
    x, y = make_batch(6, n=6)
    loss = cross_entropy(make_net(), y)
    reached = []
    for restarts in range(1, 5):
        x_adv = pgd(loss, x, eps=0.3, alpha=0.05, steps=1, restarts=restarts, norm=norm, generator=seeded(0))
        reached.append(evaluate_loss(loss, x_adv))
    gains = torch.stack(reached).diff(dim=0)
    assert (gains >= 0).all()
    assert (gains > 0).any()


def test_scalar_loss_keeps_the_batchs_worst_run() -> None:
    x, y = make_batch(6, n=6)
    each = cross_entropy(make_net(), y)
    kwargs = {"eps": 0.3, "alpha": 0.05, "steps": 1}
    runs = [pgd(lambda v: each(v).mean(), x, generator=generator, **kwargs) for generator in [seeded(0)] * 3]
    worst = max(runs, key=lambda run: evaluate_loss(each, run).mean().item())
    kept = pgd(lambda v: each(v).mean(), x, restarts=3, generator=seeded(0), **kwargs)
    # Scaling a loss changes no sign, so the runs are those of the loss a sample.
    assert torch.equal(kept, worst)


def test_margin_is_positive_exactly_where_the_model_errs() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 5.0]])
    assert margin(lambda x: x, torch.tensor([0, 1]))(logits).tolist() == [-1.0, 2.0]


def test_grad_align_is_zero_for_a_linear_loss_and_positive_for_a_bent_one() -> None:
    x, y = make_batch(7)
    w = torch.randn(3, 6, 6, generator=seeded(0))
    assert grad_align(lambda v: (v * w).sum((1, 2, 3)), x, eps=0.3).item() == pytest.approx(0.0, abs=1e-6)
    net = make_net()
    value = grad_align(cross_entropy(net, y), x, eps=0.3, generator=seeded(0))
    assert 0 < value.item() < 2
    value.backward()
    assert all(parameter.grad is not None for name, parameter in net.named_parameters() if name.endswith("weight"))


def test_grad_align_by_hand() -> None:
    """loss = x0^2 / 2 + x1: gradient (x0, 1). From x0 = 0 to x0 = 1: cos = 1 / sqrt 2."""
    loss = lambda v: v[:, 0] ** 2 / 2 + v[:, 1]  # noqa: E731
    noise = 2 * torch.rand((1, 2), generator=seeded(3)) - 1
    eps = 1 / noise[0, 0].item()
    value = grad_align(loss, torch.zeros(1, 2), eps=torch.tensor([abs(eps), 0.0]), generator=seeded(3))
    assert value.item() == pytest.approx(1 - 2**-0.5, abs=1e-6)


def test_a_nan_gradient_moves_nothing() -> None:
    x = torch.tensor([[0.0, 0.25]])
    gradient = input_gradient(lambda v: v.sqrt().sum(1) * torch.tensor([0.0]), x)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_wrong_use_is_answered_with_what_to_do() -> None:
    x, y = make_batch(8)
    loss = cross_entropy(make_net(), y)
    with pytest.raises(ValueError, match="one loss a sample"):
        fgsm_rs(lambda v: v, x, eps=0.1, alpha=0.1)
    with pytest.raises(ValueError, match="does not depend on the input"):
        fgsm_rs(lambda v: loss(v).detach(), x, eps=0.1, alpha=0.1)
    with pytest.raises(ValueError, match="floating point"):
        fgsm_rs(loss, (x * 255).byte(), eps=8, alpha=10, high=255)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    net = make_net(1)
    x, _ = make_batch(9, n=200)
    y = (x.mean((2, 3)) * 40).sum(1).long() % 4
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), x, y


@pytest.mark.skipif(importlib.util.find_spec("torchattacks") is None, reason="torchattacks is not installed")
class TestAgreementWithTorchattacks:
    """The same attack by another hand, on a trained (so not tie-ridden) tiny network."""

    @pytest.mark.parametrize("steps", [1, 7])
    def test_pgd_linf(self, trained: tuple[nn.Module, torch.Tensor, torch.Tensor], steps: int) -> None:
        import torchattacks

        net, x, y = trained
        theirs = torchattacks.PGD(net, eps=8 / 255, alpha=2 / 255, steps=steps, random_start=False)(x, y)
        ours = pgd(cross_entropy(net, y), x, eps=8 / 255, alpha=2 / 255, steps=steps, random_start=False)
        assert (ours - theirs).abs().max() < 1e-6
        assert torch.equal(net(ours).argmax(1) == y, net(theirs).argmax(1) == y)
        assert (net(ours).argmax(1) == y).float().mean() < (net(x).argmax(1) == y).float().mean()

    def test_pgd_l2(self, trained: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
        import torchattacks

        net, x, y = trained
        theirs = torchattacks.PGDL2(net, eps=0.3, alpha=0.1, steps=7, random_start=False)(x, y)
        ours = pgd(cross_entropy(net, y), x, eps=0.3, alpha=0.1, steps=7, random_start=False, norm="l2")
        assert (ours - theirs).abs().max() < 1e-4
        assert torch.equal(net(ours).argmax(1) == y, net(theirs).argmax(1) == y)

    def test_fgsm_rs_within_the_noise_of_the_start(self, trained: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
        """Their start is another draw of the same uniform law: figures agree within noise."""
        import torchattacks

        net, x, y = trained
        torch.manual_seed(0)
        theirs = torchattacks.FFGSM(net, eps=8 / 255, alpha=10 / 255)(x, y)
        ours = fgsm_rs(cross_entropy(net, y), x, eps=8 / 255, alpha=10 / 255, generator=seeded(0))
        accuracies = [(net(batch).argmax(1) == y).float().mean().item() for batch in (theirs, ours)]
        assert abs(accuracies[0] - accuracies[1]) < 0.05


def test_grad_align_with_noise_only_holds_the_gradient_at_the_image() -> None:
    """``loss = sum w x^2``: the gradients are ``2 w x`` at the image and at the noisy one."""
    x = torch.rand(3, 4, generator=seeded(1))
    noisy = x + (2 * torch.rand(3, 4, generator=seeded(5)) - 1) * 0.5
    for noise_only in (False, True):
        w = torch.tensor([1.0, 2.0, 0.5, 3.0], requires_grad=True)
        here = 2 * (w.detach() if noise_only else w) * x
        expected = 1 - nn.functional.cosine_similarity(here, 2 * w * noisy, dim=1).mean()
        (wanted,) = torch.autograd.grad(expected, w)
        how = dict(noise_only=True) if noise_only else {}
        value = grad_align(lambda v, w=w: (w * v * v).sum(1), x, eps=0.5, generator=seeded(5), **how)
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(torch.autograd.grad(value, w)[0], wanted)


def test_n_fgsm_moves_nothing_where_the_threat_is_zero() -> None:
    x = torch.full((1, 4), 0.5)
    eps = torch.tensor([[0.1, 0.0, 0.1, 0.0]])
    out = n_fgsm(lambda v: v.sum(1), x, eps=eps, alpha=0.1, noise=0.0)
    assert out.tolist()[0] == pytest.approx([0.6, 0.5, 0.6, 0.5])


def test_l2_steps_follow_the_gradient_at_the_image_of_that_step() -> None:
    """One value at 0.5, a loss with its peak at 0.6, steps of 0.2: over the peak, back, over it again."""
    x = torch.full((1, 1), 0.5)
    ends = [
        pgd(lambda v: -(v - 0.6).square().sum(1), x, eps=0.5, alpha=0.2, steps=n, norm="l2", random_start=False).item()
        for n in (1, 2, 3)
    ]
    assert ends == pytest.approx([0.7, 0.5, 0.7])
