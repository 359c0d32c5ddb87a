"""Arithmetic of the summary, and its table."""

import json
from typing import Any

import pytest
from stub_endpoint import COUNTERS, StubEndpoint

from sgl_lim.programs.intervals import wilson_interval
from sgl_lim.programs.run_records import Measurement, Row, Sample
from sgl_lim.programs.runner import Invocation
from sgl_lim.programs.server_stats import parse_server_info
from sgl_lim.programs.summary import summarize, table

SERVER = parse_server_info(StubEndpoint().server_info())
DENSE = Measurement(2, 120, 4.0, 1.0, "dense", None)


def summary_of(rows: list[Row], settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "problems": len(rows),
        "settings": settings,
        "server": SERVER,
        "invocation": Invocation(len(rows), 120, 4.0, False),
        "measurements": [DENSE],
    }
    return summarize(rows, **{**arguments, **changes})


def test_errors_count_for_nothing_else(settings: dict[str, Any], make_row: Any) -> None:
    rows = [make_row("a"), make_row("b", correct=False, tokens=(30,)), make_row("c", error="x"), make_row("d")]
    summary = summary_of(rows, settings)
    assert (summary["problems"], summary["answered"], summary["errors"], summary["correct"]) == (4, 3, 1, 2)
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["accuracy_interval"] == pytest.approx(wilson_interval(2 / 3, 3))
    assert summary["whole_chain_accuracy"] == pytest.approx(2 / 3)
    assert summary["word_accuracy"] == pytest.approx((9 + 29 + 9) / 50)
    lengths = {"mean": pytest.approx(50 / 3), "standard_error": pytest.approx(20 / 3), "median": 10, "max": 30}
    assert summary["generation_tokens"] == {**lengths, "total": 50}
    assert summary["prefix_cache_hit_share"] == 0.5
    assert summary["output_tokens_per_second"] == 30.0


def test_self_consistency_has_the_mean_of_its_samples(settings: dict[str, Any]) -> None:
    samples = (Sample("", 10, 4, 9, "stop", "1", True), Sample("", 10, 8, 9, "length", "2", False))
    row = Row("a", "1", settings, 1.0, answer="1", correct=True, samples=samples)
    summary = summary_of([row], {**settings, "samples": 2, "program": "self_consistency"})
    assert (summary["accuracy"], summary["accuracy_of"], summary["pass_at_1"]["accuracy"]) == (1.0, "maj@2", 0.5)
    assert (summary["samples"], summary["samples_cut_off"]) == (2, 1)
    assert summary["whole_chain_accuracy"] is None and summary["word_accuracy"] is None
    text = table(summary)
    assert "\nmaj@2 " in text and "\npass@1 " in text and "word accuracy" not in text
    assert text.count("mean 6.0 tokens") == 2, "a length beside every accuracy"


def test_samples_of_one_problem_are_not_independent(settings: dict[str, Any]) -> None:
    def row(identity: str, rights: int) -> Row:
        samples = tuple(Sample("", 10, 4, 9, "stop", "1", sample < rights) for sample in range(8))
        return Row(identity, "1", settings, 1.0, answer="1", correct=rights > 4, samples=samples)

    def width(*rights: int) -> float:
        summary = summary_of([row(str(n), right) for n, right in enumerate(rights)], {**settings, "samples": 8})
        assert summary["accuracy"] == summary["pass_at_1"]["accuracy"] == 0.5 and summary["accuracy_of"] == "pass@1"
        low, high = summary["accuracy_interval"]
        return float(high - low)

    alike, spread = width(8, 0, 8, 0), width(4, 4, 4, 4)
    low, high = wilson_interval(0.5, 4) or (0, 0)
    assert alike == pytest.approx(high - low), "as good as one sample a problem"
    low, high = wilson_interval(0.5, 32) or (0, 0)
    assert spread == pytest.approx(high - low), "as good as 32 problems"
    assert spread < width(6, 2, 5, 3) < alike


def test_budget_forcing_is_told(settings: dict[str, Any]) -> None:
    sample = Sample("", 10, 4, 9, "stop", "1", True, thinking_tokens=3, waits=2, forced=True)
    summary = summary_of([Row("a", "1", settings, 1.0, samples=(sample,))], settings)
    assert summary["forcing"] == {"mean_thinking_tokens": 3, "mean_waits": 2, "forced": 1}
    assert "thinking           mean 3.0 tokens, 2.00 ends dropped; 1 of 1 cut" in table(summary)


def test_attended_tokens_are_the_contexts_share(settings: dict[str, Any], make_row: Any) -> None:
    half = Measurement(1, 10, 1.0, 0.5, "", dict.fromkeys(COUNTERS, 10) | {"tokens_dense": 20})
    quarter = Measurement(1, 30, 3.0, 0.25, "", dict.fromkeys(COUNTERS, 5) | {"tokens_dense": 20})
    lost = Measurement(1, 20, 1.0, None, "the server was restarted during the run", None)
    summary = summary_of([make_row("a"), make_row("b", tokens=(30,))], settings, measurements=[half, quarter, lost])
    assert summary["attended_fraction"] == 15 / 40 and "unknown of 1 invocations" in summary["attended_note"]
    assert summary["output_tokens_per_second"] == 12.0
    # Each token follows a prompt of 100 tokens and what was generated before it.
    context = (10 * 100 + 45 + 30 * 100 + 435) / 40
    assert summary["context_tokens"] == context and summary["attended_tokens"] == context * 15 / 40
    tree = Row("t", "1", settings, 1.0, samples=(Sample("", 10, 4, 9, "stop", "1", True, other_tokens=5),))
    assert summary_of([tree], settings)["attended_tokens"] is None, "older files do not say what branches read"


def test_nothing_answered_is_no_zero(settings: dict[str, Any], make_row: Any) -> None:
    summary = summary_of([make_row("a", error="x")], settings, invocation=Invocation(0, 0, 0.0, False), measurements=[])
    for name in ("accuracy", "accuracy_interval", "output_tokens_per_second", "prefix_cache_hit_share"):
        assert summary[name] is None
    assert "0 of 1 answered, 1 errors" in table(summary)


def test_the_attended_fraction_and_its_counters_are_told(settings: dict[str, Any], make_row: Any) -> None:
    stub = StubEndpoint(counters=dict.fromkeys(COUNTERS, 1))
    counters = dict.fromkeys(COUNTERS, 10) | {"tokens_dense": 40}
    measured = Measurement(1, 10, 1.0, 0.25, "", counters)
    server = parse_server_info(stub.server_info())
    summary = summary_of([make_row("a")], settings, measurements=[measured], server=server)
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


LIM = {"decode": "lessismore", "method": "lessismore", "budget": 256}


def measured(attended: int, dense: int, selections: int = 0, **more: int) -> Measurement:
    counters = dict.fromkeys(COUNTERS, 0) | {
        "tokens_attended": attended,
        "tokens_dense": dense,
        "selections": selections,
    }
    return Measurement(1, 10, 1.0, attended / dense if dense else None, "", counters | more)


@pytest.mark.parametrize(
    ("measurement", "attention", "warned"),
    [
        pytest.param(measured(40, 40), LIM, True, id="within the budget"),
        pytest.param(measured(0, 0), LIM, True, id="prefill alone"),
        pytest.param(measured(30, 40, 2), LIM, False, id="sparse"),
        pytest.param(measured(30, 40), {**LIM, "method": "window"}, False, id="sparse without a selection"),
        pytest.param(measured(30, 40, 2, tokens_scored=20), LIM, False, id="sparse, and no less read"),
        pytest.param(measured(40, 40), {**LIM, "method": "full"}, False, id="dense as asked"),
        pytest.param(DENSE, {"decode": "dense"}, False, id="another backend"),
        pytest.param(Measurement(1, 10, 1.0, None, "restarted", None), LIM, False, id="unknown"),
    ],
)
def test_a_run_in_which_nothing_was_sparse_says_so(
    settings: dict[str, Any], make_row: Any, measurement: Measurement, attention: dict[str, Any], warned: bool
) -> None:
    of_run = {**settings, "attention": attention}
    summary = summary_of([make_row("a")], of_run, measurements=[measurement])
    told = [text for text in summary["warnings"] if "say nothing about sparse attention" in text]
    assert len(told) == warned and all("budget of 256 tokens" in text for text in told)
    assert ("\nwarning " in table(summary)) == warned


def test_cut_off_answers_are_warned_of(settings: dict[str, Any]) -> None:
    samples = tuple(Sample("", 10, 4, 9, reason, "1", True) for reason in ("stop", "length", "length"))
    row = Row("a", "1", settings, 1.0, answer="1", correct=True, samples=samples)
    summary = summary_of([row], {**settings, "samples": 3, "max_tokens": 4096})
    (text,) = summary["warnings"]
    assert text.startswith("2 of 3 generations were cut off at 4,096 tokens") and "--max-tokens" in text
    assert text in table(summary)
