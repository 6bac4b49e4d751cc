"""The rule that tells a collapse, on probes written by hand."""

from __future__ import annotations

import math

import pytest

from mmitp.attacks import CollapseRule, Probe


def verdicts(*results: tuple[float, float], chance: float = 0.1, images: int = 100, rule: CollapseRule | None = None):
    rule = rule or CollapseRule()
    return [rule.judge(Probe(single, pgd, chance, images)) for single, pgd in results]


def collapsed(*results: tuple[float, float], **kwargs: float) -> list[bool]:
    return [verdict.collapsed for verdict in verdicts(*results, **kwargs)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        pytest.param((0.9, 0.39), True, id="both"),
        pytest.param((0.7, 0.39), False, id="the single step fell too"),
        pytest.param((0.9, 0.41), False, id="pgd not fallen far enough"),
        pytest.param((0.24, 0.01), False, id="no better than guessing"),
    ],
)
def test_what_counts_as_a_collapse(second: tuple[float, float], expected: bool) -> None:
    """After a best PGD result of 0.8: below 0.4, below half of the single step, which beats a chance of 0.25."""
    assert collapsed((0.9, 0.8), second, chance=0.25) == [False, expected]


def test_a_collapse_while_eps_still_grows() -> None:
    """eps 2, 4, 6, 8: PGD's accuracy is gone at 4 while the single step's rises."""
    assert collapsed((0.6, 0.5), (0.7, 0.02), (0.8, 0.01), (0.8, 0.0)) == [False, True, True, True]


def test_a_growing_eps_alone_is_no_collapse() -> None:
    """Both fall together, here to a quarter."""
    assert collapsed((0.9, 0.88), (0.6, 0.5), (0.35, 0.26), (0.25, 0.2)) == [False] * 4


def test_a_collapse_before_the_first_probe() -> None:
    """Chance 0.1 and 100 images: three standard errors are 3 * sqrt(0.09 / 100) = 0.09, so 0.19 is not clear yet."""
    assert collapsed((0.8, 0.0), (0.85, 0.0)) == [True, True]
    assert collapsed((0.189, 0.0)) == [False]
    assert collapsed((0.191, 0.0)) == [True]
    assert collapsed((0.8, 0.11)) == [False]  # PGD still beats guessing, and there is no better probe to fall from


def test_without_guessing_a_collapse_needs_a_better_probe_before_it() -> None:
    """A detector's inverse loss: 0.2 is below half of 0.9, but nothing says that it ever was better."""
    first, second = verdicts((0.9, 0.2), (0.9, 0.2), chance=0.0)
    assert (first.collapsed, first.good) == (second.collapsed, second.good) == (False, False)
    assert collapsed((0.9, 0.6), (0.9, 0.2), chance=0.0) == [False, True]


def test_only_a_probe_without_a_gap_and_above_guessing_is_one_to_go_back_to() -> None:
    results = verdicts((0.11, 0.04), (0.5, 0.45), (0.9, 0.1), (0.4, 0.3), (0.1, 0.1), (0.0, 0.0))
    assert [(verdict.collapsed, verdict.good) for verdict in results] == [
        (False, False),  # nothing learned yet
        (False, True),
        (True, False),
        (False, True),
        (False, False),  # one class for every image
        (False, False),
    ]
    assert [bool(verdict.reason) for verdict in results] == [True, False, True, False, True, True]
    assert "0.1 under PGD against 0.9" in results[2].reason


@pytest.mark.parametrize("result", [(math.nan, 0.5), (0.5, math.nan), (math.inf, math.inf)])
def test_results_that_are_no_numbers_are_never_good_and_are_not_remembered(result: tuple[float, float]) -> None:
    rule = CollapseRule()
    (verdict,) = verdicts(result, rule=rule)
    assert (verdict.collapsed, verdict.good) == (False, False)
    assert "not finite" in verdict.reason
    assert rule.best == 0.0


def test_a_restored_rule_judges_as_the_one_it_was_saved_from() -> None:
    """The better probe came before the interruption: without it 0.15 against 0.9 would pass at a chance of 0.1."""
    rule = CollapseRule()
    verdicts((0.6, 0.5), rule=rule)
    later = CollapseRule()
    later.load_state_dict(rule.state_dict())
    assert collapsed((0.9, 0.15), rule=later) == collapsed((0.9, 0.15), rule=rule) == [True]
    assert collapsed((0.9, 0.15)) == [False]


@pytest.mark.parametrize("values", [{"drop": 0.0}, {"drop": 1.5}, {"gap": 1.5}, {"gap": math.nan}])
def test_values_that_cannot_judge_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        CollapseRule(**values)


def test_exactly_the_gap_is_none_and_a_collapsed_network_is_none_to_go_back_to() -> None:
    assert verdicts((0.8, 0.4))[0].good
    collapse = verdicts((0.9, 0.05))[0]
    assert (collapse.collapsed, collapse.good) == (True, False)
