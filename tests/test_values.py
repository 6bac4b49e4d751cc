"""What a value may be, wherever it comes from: JSON, a config, a checkpoint, NumPy."""

import numpy as np
import pytest

from mmitp.values import is_count, is_number, is_size, unlike

NONE = [True, False, None, "1", "", b"1", [], [1], {}, 1j, float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NONE, ids=repr)
def test_what_is_no_number(value):
    assert not is_number(value)
    assert not is_count(value)
    assert not is_size([value, value])


def test_numbers():
    assert all(map(is_number, (0, -1, 1.5, 10**300, np.float32(2), np.int64(3))))
    assert not is_number(10**400)  # no float holds it
    assert [is_number(v, 0) for v in (-1e-9, 0, 1)] == [False, True, True]


def test_counts():
    assert [is_count(v) for v in (0, 1, np.int64(2), 2.0, 1.5, -1)] == [False, True, True, False, False, False]
    assert [is_count(v, 0) for v in (-1, 0)] == [False, True]


def test_sizes():
    assert is_size((32, 64)) and is_size([1, 1])
    for bad in ((32,), (3, 32, 32), (0, 32), (32, -1), (32.0, 32), "32", "ab", 32, None, {32, 64}):
        assert not is_size(bad)


STATE = dict(count=3, frozen=False, weight=1.5, name="b", square=np.zeros((2, 3)), seen=[(1, 0.5)], any=None)


def test_a_state_like_the_programs_own_passes():
    assert unlike(STATE, STATE, "state") == ""
    assert unlike(dict(STATE, weight=2, square=None, seen=[], any="x", more=1), STATE, "state") == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(count=3.5), "state.count must be a whole number, got 3.5"),
        (dict(count=None), "state.count must be a whole number, got None"),
        (dict(frozen=1), "state.frozen must be True or False, got 1"),
        (dict(weight=float("nan")), "state.weight must be a finite number, got nan"),
        (dict(name=7), "state.name must be text, got 7"),
        (dict(square=np.zeros(6)), "state.square must be a tensor of shape (2, 3), got a tensor of shape (6,)"),
        (dict(seen=5), "state.seen must be a list, got 5"),
        (dict(seen=[(1, 0.5), (2,)]), "state.seen[1] must have 2 entries, got 1"),
        (dict(seen=[(1, "x")]), "state.seen[0][1] must be a finite number, got 'x'"),
    ],
)
def test_what_is_otherwise_is_named(change, says):
    assert unlike(dict(STATE, **change), STATE, "state") == says


def test_what_is_missing_is_named():
    assert unlike([], STATE, "state") == "state must be a dictionary, got []"
    assert unlike({key: value for key, value in STATE.items() if key != "seen"}, STATE, "state") == "state lacks 'seen'"
