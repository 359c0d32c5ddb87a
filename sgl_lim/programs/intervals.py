"""Means with their uncertainty, where several samples of one item are not independent."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

_Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
_RESAMPLES, _CHUNK = 10_000, 500

Interval = tuple[float, float]


def wilson_interval(rate: float, trials: float) -> Interval | None:
    """The 95% Wilson score interval of a proportion `rate` of `trials`; None without trials."""
    if not trials:
        return None
    z2 = _Z95 * _Z95
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    # Rounding must not put the rate outside, as it would where none of 12 is right.
    return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))


def clustered_interval(item_rates: Sequence[float], samples: int) -> Interval | None:
    """The 95% interval of the mean of `item_rates`, each the mean of `samples` right or wrong ones; None without items.

    Wilson's, over as many independent trials as have the variance that the items' means show: with one sample an item
    these are the items and the interval is the usual one; more samples make them more, up to all samples, and the less
    so the more the samples of an item agree. Unlike a bootstrap it has a width where all items agree.
    """
    items = len(item_rates)
    if not items:
        return None
    rate = statistics.fmean(item_rates)
    variance = statistics.pvariance(item_rates, rate) / items
    most, single = float(items * samples), rate * (1 - rate)
    # All right or all wrong: that samples of an item always agree cannot be told apart, so the items count.
    trials = float(items) if single <= 0 else min(most, single / variance) if variance > 0 else most
    return wilson_interval(rate, trials)


def standard_error(item_means: Sequence[float]) -> float | None:
    """Of the mean of independent items, each of them the mean of its samples; None of fewer than two."""
    return statistics.stdev(item_means) / math.sqrt(len(item_means)) if len(item_means) > 1 else None


def paired_difference(first: Sequence[float], other: Sequence[float]) -> tuple[float, Interval] | None:
    """Mean of `other - first` over the same items, with its 95% interval by bootstrap over items (percentiles).

    None of fewer than two items. The same input gives the same interval.
    """
    drawn = _resampled(np.asarray(other, dtype=float) - np.asarray(first, dtype=float))
    return None if drawn is None else (statistics.fmean(other) - statistics.fmean(first), _percentiles(drawn))


def paired_ratio(first: Sequence[float], other: Sequence[float]) -> tuple[float, Interval] | None:
    """Ratio of the mean of `other` to that of `first`, as `paired_difference`; None too if `first` has zeros alone."""
    below, above = _resampled(np.asarray(first, dtype=float)), _resampled(np.asarray(other, dtype=float))
    if below is None or above is None or not below.all():
        return None
    return statistics.fmean(other) / statistics.fmean(first), _percentiles(above / below)


def _resampled(values: "np.ndarray") -> "np.ndarray | None":
    """Means of resamples; of equally many values the draws are the same."""
    if len(values) < 2:
        return None
    random = np.random.Generator(np.random.PCG64(0))
    shape = (_CHUNK, len(values))
    chunks = (values[random.integers(len(values), size=shape)].mean(axis=1) for _ in range(_RESAMPLES // _CHUNK))
    return np.concatenate(list(chunks))


def _percentiles(drawn: "np.ndarray") -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
