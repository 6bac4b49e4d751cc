"""What a value may be, wherever it comes from: JSON, a config, a checkpoint, NumPy."""

import numpy as np
import pytest

from mmitp.values import is_count, is_number, is_size

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
