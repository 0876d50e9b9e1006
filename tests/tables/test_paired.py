"""Paired differences against scipy's own test, and which row a row is compared with."""

import random
import sys

import pytest
from scipy.stats import ttest_rel

from gcahng.errors import InputError
from gcahng.tables.paired import paired_difference


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_intervals_are_those_of_a_paired_t_test(count: int) -> None:
    draws = random.Random(count)
    ours = {seed: draws.gauss(70, 2) for seed in range(count)}
    reference = {seed: draws.gauss(68, 2) for seed in range(count)}
    found = paired_difference(ours, reference)
    assert found is not None and found.half_width is not None
    want = ttest_rel(list(ours.values()), list(reference.values())).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(want.low, rel=1e-9)
    assert found.mean + found.half_width == pytest.approx(want.high, rel=1e-9)


def test_only_common_seeds_count() -> None:
    found = paired_difference({0: 5.0, 1: 7.0, 3: 100.0}, {1: 4.0, 0: 4.0, 2: -100.0})
    assert found is not None and (found.seeds, found.mean) == ((0, 1), 2.0)
    # t(0.975, 1) = 12.7062; the differences 1 and 3 have a standard error of 1.
    assert found.half_width == pytest.approx(12.7062, abs=1e-4)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(InputError, match="need scipy, which is not installed.*pip install scipy"):
        paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 1.0})
