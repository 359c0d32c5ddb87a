"""Throughput and latency from what a run received."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.closed_loop import Generation, Load


@dataclass(frozen=True)
class Figures:
    """One run's figures; None where the run has none."""

    tokens_per_s: float  # output tokens over the whole window, prefill included
    steady_tokens_per_s: float | None
    steady_s: float | None  # how long the steady window is
    ttft_ms: tuple[float, float] | None  # p50 and p99, of the requests that got a token
    tpot_ms: tuple[float, float] | None  # p50 and p99 over requests of the mean time a token, the first one excluded
    done: int
    mean_output: float | None  # tokens, of the requests done
    complete: bool


def figures(load: Load, concurrency: int) -> Figures:
    """The figures of a run of `concurrency` clients."""
    generations = load.generations
    ended = [g for g in generations if g.ended is not None]
    window = steady_window(load, concurrency)
    return Figures(
        tokens_per_s=_tokens_between(generations, load.begun, load.ended) / (load.ended - load.begun),
        steady_tokens_per_s=_tokens_between(generations, *window) / (window[1] - window[0]) if window else None,
        steady_s=window[1] - window[0] if window else None,
        ttft_ms=_percentiles((g.times[0] - g.begun) * 1e3 for g in generations if g.times),
        # A first chunk may hold several tokens: those after it are what the time after it took.
        tpot_ms=_percentiles(
            (g.times[-1] - g.times[0]) * 1e3 / (g.tokens[-1] - g.tokens[0]) for g in generations if len(g.times) > 1
        ),
        done=len(ended),
        mean_output=sum(g.tokens[-1] for g in ended) / len(ended) if ended else None,
        complete=load.complete,
    )


def steady_window(load: Load, concurrency: int) -> tuple[float, float] | None:
    """While `concurrency` requests run: from the last first token of the first `concurrency` requests to the first
    end that no further request follows (or the time limit). None if they never all run.

    With one wave no prefill falls into it; with more, those of the later waves do.
    """
    generations = load.generations
    first_wave = generations[:concurrency]
    if len(first_wave) < concurrency or not all(g.times for g in first_wave):
        return None
    begin = max(g.times[0] for g in first_wave)
    # A client begins its next request right after its last one ended: nothing follows an end after the last beginning.
    last_begun = generations[-1].begun
    end = min((g.ended for g in generations if g.ended is not None and g.ended > last_begun), default=load.ended)
    return (begin, end) if begin < end else None


def _tokens_between(generations: Iterable[Generation], begin: float, end: float) -> int:
    return sum(_tokens_by(g, end) - _tokens_by(g, begin) for g in generations)


def _tokens_by(generation: Generation, time: float) -> int:
    chunks = bisect_right(generation.times, time)
    return generation.tokens[chunks - 1] if chunks else 0


def _percentiles(values: Iterable[float]) -> tuple[float, float] | None:
    known: Sequence[float] = list(values)
    if not known:
        return None
    p50, p99 = np.percentile(known, [50, 99])
    return float(p50), float(p99)
