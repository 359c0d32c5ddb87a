"""The rule by which a candidate is chosen, and the figures that it follows."""

import math

import pytest

from sgl_lim.calibrate.bench import ItemScore
from sgl_lim.calibrate.candidates import Candidate
from sgl_lim.calibrate.outcome import Outcome, Retrieval, choose, frontier, outcome
from sgl_lim.evaluate.measure import Share


def text(divergence, agreed, tokens=10, suite="english"):
    return ItemScore(suite, "text", tokens, divergence, agreed, False, -5.0)


def needle(whole, nats, task="needles"):
    return ItemScore(task, task, 3, 0.5, 2, whole, nats)


A = Candidate((2, 8), "set")


def test_figures_are_of_text_and_of_what_full_attention_can_do():
    full = [text(0, 10), text(0, 30, 30, "own"), needle(True, -0.25), needle(True, -0.75)]
    full += [needle(False, -3), needle(False, -3), needle(False, -9, "chains")]
    found = outcome(A, [text(2, 9), text(1, 24, 30, "own"), needle(True, -0.5), needle(False, -2.5), *full[4:]], full)
    assert (found.tokens, found.divergence, found.agreement.value) == (40, 3 / 40, 33 / 40)
    assert found.agreement.low < 33 / 40 < found.agreement.high and found.by_suite == {"english": 0.9, "own": 0.8}
    assert list(found.retrieval) == ["needles"]
    one = found.retrieval["needles"]
    assert (one.right.value, one.full, one.lost_points, one.lost_nats) == (0.25, 0.5, 25.0, 1.0)


def test_chains_count_where_there_is_no_text():
    found = outcome(A, [needle(True, -1, "chains")], [needle(True, -1, "chains")])
    assert (found.tokens, found.divergence, found.agreement.value) == (3, 0.5 / 3, 2 / 3)


def test_tokens_within_the_budget_say_nothing():
    with pytest.raises(ValueError, match="beyond the budget"):
        outcome(A, [text(0, 0, tokens=0)], [text(0, 0, tokens=0)])


def of(layers, divergence, *, lost=0.0, nats=0.0, items=100, attends="set"):
    right = Share(1 - lost, 0, 1)
    share = Share(0.9, 0.8, 1.0)
    retrieval = {"needles": Retrieval(items, right, 1.0, nats)}
    return Outcome(Candidate(layers, attends), 100, divergence, None, share, {}, retrieval)


def test_the_least_divergence_that_keeps_needles_is_chosen():
    best = of((1, 5), 0.02)
    others = [of((1, 6), 0.03), of((1, 7), 0.01, lost=0.03), of((1, 8), 0.01, nats=0.4), of((6, 7, 8), 0.001)]
    assert choose([*others, best], reads=2) == best
    # Within two of 100, or one item where items are few.
    for kept in (of((1, 7), 0.01, lost=0.02), of((1, 7), 0.01, lost=0.1, items=10)):
        assert choose([*others, best, kept], reads=2) == kept


def test_of_alike_ones_the_one_that_reads_least_is_chosen():
    assert choose([of((0, 2, 5), 0.01), of((0, 5), 0.0101), of((0,), 0.011)], reads=4).candidate.layers == (0, 5)


def test_if_none_keeps_needles_the_one_that_loses_least_is_chosen():
    found = [of((0, 3), 0.02, lost=0.5, nats=4.0), of((0, 4), 0.3, lost=0.3, nats=2.0)]
    assert choose(found, reads=4).candidate.layers == (0, 4)


def test_nothing_that_reads_so_little_is_told():
    with pytest.raises(ValueError, match=r"at most 0\.5 full layers"):
        choose([of((0, 3), 0.02)], reads=0.5)


def test_the_frontier_has_what_pays_for_its_reads():
    points = [of((0,), 0.3), of((0, 5), 0.1), of((1, 5), 0.2), of((2, 5), 0.05), of((3, 5), 0.01, lost=0.5)]
    assert [one.candidate.layers for one in frontier(points)] == [(0,), (0, 5), (2, 5)]
    assert math.isclose(frontier(points)[0].divergence, 0.3)
