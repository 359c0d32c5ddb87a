"""Windows and percentiles, on runs whose figures can be worked out by hand."""

from array import array
from collections.abc import Sequence

import pytest

from benchmarks.closed_loop import Generation, Load
from benchmarks.figures import figures, steady_window


def generation(begun: float, *chunks: tuple[float, int], ended: float | None = None) -> Generation:
    return Generation(begun, array("d", [at for at, _ in chunks]), array("i", [n for _, n in chunks]), ended)


def load(generations: Sequence[Generation], ended: float, *, complete: bool = True) -> Load:
    return Load(generations, begun=0.0, ended=ended, complete=complete, client_busy=0.0)


def test_one_wave_is_steady_between_the_last_first_token_and_the_first_end() -> None:
    run = load(
        [
            generation(0.0, (1.0, 1), (3.0, 11), (6.0, 21), ended=6.0),
            generation(0.1, (2.0, 1), (4.0, 11), (8.0, 21), ended=8.0),
        ],
        ended=10.0,
    )
    result = figures(run, concurrency=2)
    assert steady_window(run, 2) == (2.0, 6.0)
    # The first request had 1 token at 2.0 and 21 at 6.0, the second 1 and 11.
    assert result.steady_tokens_per_s == pytest.approx((20 + 10) / 4)
    assert result.steady_s == pytest.approx(4.0)
    assert result.tokens_per_s == pytest.approx(42 / 10)
    assert result.mean_output == 21 and result.done == 2


def test_more_waves_are_steady_until_an_end_that_nothing_follows() -> None:
    run = load(
        [
            generation(0.0, (1.0, 1), (4.0, 9), ended=4.0),
            generation(0.1, (2.0, 1), (5.0, 9), ended=5.0),
            generation(4.1, (4.5, 1), (9.0, 9), ended=9.0),
            generation(5.1, (5.5, 1), (8.0, 9), ended=8.0),
        ],
        ended=9.0,
    )
    assert steady_window(run, 2) == (2.0, 8.0)


def test_no_steady_window_where_a_request_waits_for_another() -> None:
    waits = generation(0.1, (6.5, 1), (9.0, 9), ended=9.0)
    run = load([generation(0.0, (1.0, 1), (6.0, 9), ended=6.0), waits], ended=9.0)
    assert steady_window(run, 2) is None
    assert figures(run, 2).steady_tokens_per_s is None


def test_steady_window_ends_at_the_time_limit_while_requests_are_left() -> None:
    first, second = generation(0.0, (1.0, 1), (3.0, 9), ended=3.0), generation(0.1, (2.0, 1), (4.0, 5))
    third = generation(3.1, (3.5, 1), (4.5, 3))
    assert steady_window(load([first, second, third], 5.0, complete=False), 2) == (2.0, 5.0)
    assert steady_window(load([first, generation(0.1)], 5.0, complete=False), 2) is None


def test_what_came_after_the_window_does_not_count() -> None:
    run = load([generation(0.0, (1.0, 1), (4.0, 9), (6.0, 20))], ended=5.0, complete=False)
    assert figures(run, 1).tokens_per_s == pytest.approx(9 / 5)


def test_latencies_are_percentiles_over_requests() -> None:
    # TTFT 10, 20, … 1000 ms; TPOT 1 … 100 ms, whatever the first chunk holds.
    run = load(
        [
            generation(0.0, (n / 100, 1 + n % 3), (n / 100 + n / 100, 11 + n % 3), ended=n / 100 + n / 100)
            for n in range(1, 101)
        ],
        ended=3.0,
    )
    result = figures(run, 100)
    assert result.ttft_ms == pytest.approx((505.0, 990.1))
    assert result.tpot_ms == pytest.approx((50.5, 99.01))
