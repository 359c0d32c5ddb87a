"""Arithmetic of the summary, and its table."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stub_endpoint import COUNTERS, StubEndpoint

from sgl_lim.programs.records import Row, Sample
from sgl_lim.programs.runner import Invocation
from sgl_lim.programs.server_stats import AttendedFraction, attended_fraction, parse_server_info
from sgl_lim.programs.summary import summarize, table, wilson_interval

SERVER = parse_server_info(StubEndpoint().server_info())
DENSE = AttendedFraction(1.0, "dense")


def summary_of(rows: list[Row], settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "problems": len(rows),
        "settings": settings,
        "server": SERVER,
        "invocation": Invocation(len(rows), 120, 4.0, False),
        "attended": DENSE,
    }
    return summarize(rows, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_against_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_stays_in_range(case: tuple[int, int]) -> None:
    successes, trials = case
    interval = wilson_interval(successes, trials)
    assert interval is not None
    assert 0 <= interval[0] <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= interval[1] <= 1


def test_errors_count_for_nothing_else(settings: dict[str, Any], make_row: Any) -> None:
    rows = [make_row("a"), make_row("b", correct=False, tokens=(30,)), make_row("c", error="x"), make_row("d")]
    summary = summary_of(rows, settings)
    assert (summary["problems"], summary["answered"], summary["errors"], summary["correct"]) == (4, 3, 1, 2)
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["accuracy_interval"] == wilson_interval(2, 3)
    assert summary["whole_chain_accuracy"] == pytest.approx(2 / 3)
    assert summary["word_accuracy"] == pytest.approx((9 + 29 + 9) / 50)
    assert summary["generation_tokens"] == {"mean": pytest.approx(50 / 3), "median": 10, "max": 30, "total": 50}
    assert summary["prefix_cache_hit_share"] == 0.5
    assert summary["output_tokens_per_second"] == 30.0


def test_self_consistency_has_the_mean_of_its_samples(settings: dict[str, Any]) -> None:
    samples = (Sample("", 10, 4, 9, "stop", "1", True), Sample("", 10, 8, 9, "length", "2", False))
    row = Row("a", "1", settings, 1.0, answer="1", correct=True, samples=samples)
    summary = summary_of([row], {**settings, "samples": 2})
    assert summary["accuracy"] == 1.0 and summary["mean_sample_accuracy"] == 0.5
    assert (summary["samples"], summary["samples_cut_off"]) == (2, 1)
    assert summary["whole_chain_accuracy"] is None and summary["word_accuracy"] is None
    text = table(summary)
    assert "accuracy maj@2" in text and "mean pass@1" in text and "word accuracy" not in text


def test_nothing_answered_is_no_zero(settings: dict[str, Any], make_row: Any) -> None:
    summary = summary_of([make_row("a", error="x")], settings, invocation=Invocation(0, 0, 0.0, False))
    for name in ("accuracy", "accuracy_interval", "output_tokens_per_second", "prefix_cache_hit_share"):
        assert summary[name] is None
    assert "0 of 1 answered, 1 errors" in table(summary)


def test_the_attended_fraction_and_its_counters_are_told(settings: dict[str, Any], make_row: Any) -> None:
    def state(value: int) -> Any:
        counters = dict.fromkeys(COUNTERS, value) | {"tokens_dense": 4 * value}
        return parse_server_info(StubEndpoint(counters=counters).server_info())

    summary = summary_of([make_row("a")], settings, attended=attended_fraction(state(1), state(11)), server=state(11))
    assert summary["attended_fraction"] == 0.25
    assert summary["attended_counters"]["tokens_dense"] == 40
    assert "0.250  (10 of 40 KV tokens" in table(summary)
    assert "budget 256" in table(summary)


def test_the_summary_is_json_and_the_table_is_aligned(settings: dict[str, Any], make_row: Any) -> None:
    summary = summary_of([make_row("a")], settings)
    assert json.loads(json.dumps(summary))["attended_note"] == "dense"
    lines = table(summary).splitlines()
    column = lines[0].index("decode dense")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
