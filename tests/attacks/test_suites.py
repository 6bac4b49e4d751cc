"""Bridges to attack suites."""

from __future__ import annotations

import builtins
import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmitp.attacks import NormalizedClassifier, autoattack_accuracy, cross_entropy, pgd
from mmitp.attacks.suites import _check_suite, _fit_targets, pick_logits

needs_suite = pytest.mark.skipif(importlib.util.find_spec("pyautoattack") is None, reason="pyautoattack not installed")


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(24, 3, 4, 4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5))
    return net, x, net(x).argmax(1)


def test_normalized_classifier_undoes_what_a_preprocessor_does() -> None:
    pixels = torch.tensor([10.0, 100.0, 200.0]).view(1, 3, 1, 1)
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    wrapped = NormalizedClassifier(nn.Flatten(), mean, std)
    expected = [(p - m) / s for p, m, s in zip([10.0, 100.0, 200.0], mean, std, strict=True)]
    assert wrapped(pixels / 255)[0].tolist() == pytest.approx(expected, abs=1e-5)
    in_unit = NormalizedClassifier(nn.Flatten(), [0.5], [0.25], pixel_range=1.0)
    assert in_unit(torch.tensor([[0.75]])[..., None, None]).item() == pytest.approx(1.0)
    assert not wrapped.state_dict()  # shares the model's parameters and adds no keys of its own


def test_normalized_classifier_takes_the_last_of_several_outputs() -> None:
    class Tower(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x + 1

    assert NormalizedClassifier(Tower(), [0.0], [255.0])(torch.ones(1, 1, 1, 1)).item() == 2.0


def test_normalized_classifier_refuses_a_std_of_zero() -> None:
    with pytest.raises(ValueError, match="positive std"):
        NormalizedClassifier(nn.Flatten(), [0.0], [0.0])


@pytest.mark.parametrize("values", [([0.0], [float("nan")]), ([float("nan")], [1.0]), ([0.0], [float("inf")])])
def test_normalized_classifier_refuses_what_is_not_finite(values: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="finite values"):
        NormalizedClassifier(nn.Flatten(), *values)
    with pytest.raises(ValueError, match="pixel_range, the value of full white"):
        NormalizedClassifier(nn.Flatten(), [0.0], [1.0], pixel_range=values[1][0] if values[1] != [1.0] else 0.0)


@needs_suite
def test_autoattack_is_at_least_as_strong_as_pgd_and_leaves_the_model_alone(
    setting: tuple[nn.Module, torch.Tensor, torch.Tensor],
) -> None:
    net, x, y = setting
    net.train()
    eps = 0.02
    result = autoattack_accuracy(
        net, x, y, eps=eps, version="custom", attacks=["apgd-ce", "fab-t"], batch_size=10, seed=1
    )
    assert result.clean == 1.0
    assert result.images == 24
    assert result.attacks == ["apgd-ce", "fab-t"]
    by_pgd = net(pgd(cross_entropy(net, y), x, eps=eps, alpha=eps / 4, steps=10)).argmax(1) == y
    assert 0 < result.robust <= by_pgd.float().mean().item()
    assert result.adversarial is not None
    assert (result.adversarial - x).abs().max() <= eps + 1e-6
    assert "fab-t aims at 4 classes, not the published 9" in result.flags
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@needs_suite
def test_sanity_flags_are_surfaced(setting: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    net, x, y = setting

    class Random(nn.Module):
        def forward(self, v: torch.Tensor) -> torch.Tensor:
            return net(v) + torch.randn(len(v), 5)

    class Rounded(nn.Module):
        def forward(self, v: torch.Tensor) -> torch.Tensor:
            return (net(v) * 1000).round()

    def flags(model: nn.Module, attack: str = "apgd-ce") -> str:
        result = autoattack_accuracy(model, x[:4], y[:4], eps=0.01, version="custom", attacks=[attack])
        return " ".join(result.flags)

    assert flags(net) == ""
    assert "probability distribution" in flags(nn.Sequential(net, nn.Softmax(1)))
    assert "randomized" in flags(Random())
    assert "zero gradient" in flags(Rounded(), "apgd-dlr")


class Named(nn.Module):
    """A classifier whose logits stand under a name, after another output."""

    def __init__(self, net: nn.Module, key: str = "logits") -> None:
        super().__init__()
        self.net, self.key = net, key

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": x, self.key: self.net(x)}


@needs_suite
def test_autoattack_takes_other_precisions_labels_and_outputs(
    setting: tuple[nn.Module, torch.Tensor, torch.Tensor],
) -> None:
    """The same network in float64, with int32 labels, behind a dict and a tuple: the same figures."""
    net, x, y = setting
    x, y, eps = x[:6], y[:6], 0.02

    class Pair(nn.Module):
        def forward(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return v, net(v)

    def figures(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        result = autoattack_accuracy(model, x, y, eps=eps, version="custom", attacks=["apgd-ce"])
        assert result.adversarial is not None
        assert result.adversarial.dtype == x.dtype
        assert (result.adversarial - x).abs().max() <= eps + 1e-6
        return result.clean, result.robust

    expected = figures(net, x, y)
    assert expected[0] == 1.0
    double = copy.deepcopy(net).double()
    assert figures(double, x, y) == figures(double, x.double(), y.int()) == expected
    assert figures(Named(net), x, y.byte()) == figures(Pair(), x, y) == expected


@needs_suite
def test_images_that_withstand_come_back_bit_for_bit(setting: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    """Of float64 too, which the suite sees rounded."""
    net, _, _ = setting
    x = torch.rand(4, 3, 4, 4, dtype=torch.float64)
    y = copy.deepcopy(net).double()(x).argmax(1)
    result = autoattack_accuracy(net, x, y, eps=1e-6, version="custom", attacks=["apgd-ce"])
    assert result.robust == 1.0
    assert torch.equal(result.adversarial, x)  # type: ignore[arg-type]


@needs_suite
def test_wrong_use_of_autoattack_is_answered(setting: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    net, x, y = setting
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        autoattack_accuracy(net, x * 2, y, eps=0.1)
    with pytest.raises(ValueError, match="version='custom'"):
        autoattack_accuracy(net, x, y, eps=0.1, attacks=["square"])
    with pytest.raises(ValueError, match="at least one image"):
        autoattack_accuracy(net, x[:0], y[:0], eps=0.1)
    with pytest.raises(ValueError, match="at least 4 classes"):
        autoattack_accuracy(nn.Sequential(net, nn.Linear(5, 3)), x, y % 3, eps=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        autoattack_accuracy(net, torch.where(x > 0.9, torch.nan, x), y, eps=0.1)
    with pytest.raises(ValueError, match="must be floating point"):
        autoattack_accuracy(net, (x > 0.5).byte(), y, eps=0.1)
    for labels in (nn.functional.one_hot(y), y.float(), y[:, None]):
        with pytest.raises(ValueError, match="labels must be class indices"):
            autoattack_accuracy(net, x, labels, eps=0.1)
    with pytest.raises(ValueError, match="knows 5 classes: labels are class indices, from 0"):
        autoattack_accuracy(net, x, torch.full_like(y, 5), eps=0.1)  # the first number that is none
    with pytest.raises(ValueError, match=r"Named returns dict with the keys \['features', 'scores'\]: wrap it"):
        autoattack_accuracy(Named(net, "scores"), x, y, eps=0.1)
    with pytest.raises(ValueError, match="8/255 for eps 8"):
        autoattack_accuracy(net, x, y, eps=8)
    with pytest.raises(ValueError, match="eps must be finite"):
        autoattack_accuracy(net, x, y, eps=float("nan"))
    with pytest.raises(ValueError, match="norm must be one of"):
        autoattack_accuracy(net, x, y, eps=0.1, norm="linf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \['pgd'\]"):
        autoattack_accuracy(net, x, y, eps=0.1, version="custom", attacks=["pgd"])


def test_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, setting: tuple[nn.Module, torch.Tensor, torch.Tensor]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "pyautoattack":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"\.\[autoattack\]"):
        autoattack_accuracy(*setting, eps=0.1)


def test_the_logits_are_the_last_output_whatever_stands_before_it() -> None:
    one, two, three = (torch.full((1, 2), float(i)) for i in range(3))
    assert pick_logits((one, two, three)) is three
    assert pick_logits([one]) is one
    assert pick_logits((one, {"loss": two, "logits": three})) is three


@pytest.mark.parametrize(
    ("attacks", "classes", "refused"),
    [
        (["apgd-ce", "square"], 2, False),
        (["apgd-ce"], 1, True),
        (["apgd-dlr"], 3, False),
        (["apgd-dlr"], 2, True),
        (["apgd-t"], 4, False),
        (["apgd-t"], 3, True),
    ],
)
def test_each_attack_has_the_fewest_classes_that_its_loss_wants(
    attacks: list[str], classes: int, refused: bool
) -> None:
    suite = SimpleNamespace(attacks_to_run=attacks, apgd_targeted=SimpleNamespace(n_target_classes=1), fab=None)
    suite.fab = SimpleNamespace(n_target_classes=1)
    if refused:
        with pytest.raises(ValueError, match=f"need a classifier of at least {classes + 1} classes"):
            _fit_targets(suite, classes)
    else:
        assert _fit_targets(suite, classes) == []


def test_targeted_attacks_that_run_aim_at_the_classes_there_are_and_say_so() -> None:
    targeted, fab = SimpleNamespace(n_target_classes=9), SimpleNamespace(n_target_classes=9)
    suite = SimpleNamespace(attacks_to_run=["apgd-t", "square"], apgd_targeted=targeted, fab=fab)
    assert _fit_targets(suite, 5) == ["apgd-t aims at 4 classes, not the published 9"]
    assert (targeted.n_target_classes, fab.n_target_classes) == (4, 9)  # FAB does not run
    assert _fit_targets(suite, 5) == []


def test_a_batch_of_one_image_and_the_whole_range_are_sizes() -> None:
    _check_suite(1.0, "Linf", "standard", None, 1)
    for eps, batch_size, text in ((1.01, 1, "eps=1.01"), (1.0, 0, "batch_size")):
        with pytest.raises(ValueError, match=text):
            _check_suite(eps, "Linf", "standard", None, batch_size)
