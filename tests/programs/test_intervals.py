"""Intervals of means: published values, clusters, pairs."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sgl_lim.programs.intervals import (
    clustered_interval,
    paired_difference,
    paired_ratio,
    standard_error,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_against_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes / trials, trials) == pytest.approx((low, high), abs=1e-4)


@example((0, 12))  # in floats the formula gives a lower end above 0
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_stays_in_range(case: tuple[int, int]) -> None:
    successes, trials = case
    interval = wilson_interval(successes / trials, trials)
    assert interval is not None
    assert 0 <= interval[0] <= successes / trials <= interval[1] <= 1


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_clusters_lie_between_items_and_samples(rights: list[int]) -> None:
    rates = [right / 8 for right in rights]
    rate, interval = sum(rates) / len(rates), clustered_interval(rates, 8)
    wide, narrow = wilson_interval(rate, len(rates)), wilson_interval(rate, 8 * len(rates))
    assert interval is not None and wide is not None and narrow is not None
    assert wide[0] - 1e-9 <= interval[0] <= narrow[0] + 1e-9
    assert narrow[1] - 1e-9 <= interval[1] <= wide[1] + 1e-9


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_one_sample_an_item_is_the_usual_interval(rights: list[int]) -> None:
    assert clustered_interval(rights, 1) == pytest.approx(wilson_interval(sum(rights) / len(rights), len(rights)))


def test_nothing_has_no_interval() -> None:
    assert wilson_interval(0, 0) is clustered_interval([], 4) is None
    assert standard_error([3.0]) is paired_difference([1.0], [2.0]) is paired_ratio([0.0, 0.0], [1.0, 2.0]) is None


def test_the_standard_error_of_a_mean() -> None:
    assert standard_error([1.0, 3.0, 5.0]) == pytest.approx(2 / 3**0.5)


def test_pairs_know_more_than_two_runs() -> None:
    first = [0.0, 1.0] * 20
    better = [min(1.0, value + 0.25) for value in first]
    difference = paired_difference(first, better)
    assert difference is not None
    value, (low, high) = difference
    assert value == pytest.approx(0.125) and 0.08 < low < value < high < 0.17
    assert difference == paired_difference(first, better), "deterministic"
    assert paired_difference(first, first) == (0.0, (0.0, 0.0))
    assert paired_ratio([10.0, 20.0, 30.0], [11.0, 22.0, 33.0]) == (pytest.approx(1.1), pytest.approx((1.1, 1.1)))
