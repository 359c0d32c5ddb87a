"""The search for selection layers: the best by a model of losses, against trying them all."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_lim.calibrate.candidates import Candidate
from sgl_lim.calibrate.search import Model, neighbours, spaced, swaps


def expected(missed, weights, layers, attends):
    """By the definition: each layer that reads a set misses what the last selection layer before it missed."""
    total = 0.0
    for j in range(layers[0], len(missed)):
        if j not in layers:
            total += weights[j] * missed[max(i for i in layers if i < j)][j]
        elif attends == "set":
            total += weights[j] * missed[j][j]
    return total


@st.composite
def models(draw):
    depth = draw(st.integers(2, 7))
    shares = st.floats(0, 1, allow_subnormal=False)
    recall = [[draw(shares) for _ in range(depth)] for _ in range(depth)]
    weights = np.array([draw(st.floats(0, 4, allow_subnormal=False)) for _ in range(depth)])
    return Model(1 - np.array(recall), weights)


@given(models(), st.sampled_from(["set", "context"]))
def test_nothing_is_expected_to_lose_less(model, attends):
    depth = len(model.weights)
    found = model.best(attends, dense=range(depth), most=depth)
    shapes = {(one.layers[0], len(one.layers)) for one in found}
    assert shapes == {(f, n) for f in range(depth) for n in range(1, depth) if n <= depth - f and f + n < depth}
    for one in found:
        others = itertools.combinations(range(one.layers[0] + 1, depth), len(one.layers) - 1)
        least = min(expected(model.missed, model.weights, (one.layers[0], *rest), attends) for rest in others)
        assert model.expected(one) == pytest.approx(least, abs=1e-9)
        assert model.expected(one) == pytest.approx(expected(model.missed, model.weights, one.layers, attends))


def test_layers_before_anything_was_tried_count_by_depth():
    recall = [[1.0, 0.5, 0.75, 1.0], [0.0, 1.0, 0.5, 0.5], [0.0, 0.0, 1.0, 0.0], [0.0] * 4]
    model = Model.by_depth(recall)
    assert model.weights.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert model.expected(Candidate((0, 1), "context")) == 0.5 * 0.5 + 0.25 * 0.5


def test_the_fit_finds_the_layer_that_matters():
    """Losses of a world where one layer decides, which coverage weighted by depth cannot know."""
    rng, depth = random.Random(0), 10
    recall = [[rng.uniform(0.6, 1.0) for _ in range(depth)] for _ in range(depth)]
    begin = Model.by_depth(recall)
    truth = Model(begin.missed, np.where(np.arange(depth) == 7, 1.0, 0.01))
    tried = [Candidate(tuple(sorted(rng.sample(range(depth - 1), 3))), "set") for _ in range(30)]
    fitted = begin.fitted((one, truth.expected(one)) for one in tried)
    assert int(np.argmax(fitted.weights)) == 7 and (fitted.weights >= 0).all()
    new = [Candidate(tuple(sorted(rng.sample(range(depth - 1), 2))), "set") for _ in range(30)]

    def error(model):
        return np.mean([abs(np.log(model.expected(one) / truth.expected(one))) for one in new])

    assert error(fitted) < 0.3 < error(begin)


def test_neighbours_differ_by_one_layer():
    found = {one.layers for one in neighbours(Candidate((1, 4), "set"), 6, 2)}
    moved = {(0, 4), (2, 4), (1, 2), (1, 3), (1, 5)}
    added = {(0, 1, 4), (1, 2, 4), (1, 3, 4), (1, 4, 5)}
    # One that begins with layer 3 or 4 would have too many dense layers.
    assert found == moved | added | {(1,)}


def test_a_swap_puts_one_layer_behind_the_first_anywhere_else():
    found = {one.layers for one in swaps(Candidate((1, 3, 4), "set"), 6)}
    assert found == {(1, 2, 4), (1, 4, 5), (1, 2, 3), (1, 3, 5)}


def test_spaced_layers_leave_the_last_one():
    found = [one.layers for one in spaced(9, 1, "set")]
    assert (0, 4) in found and (1, 5) in found and (0, 3, 6) in found and all(layers[-1] < 8 for layers in found)
    assert len(set(found)) == len(found)


def test_what_is_read_whole_is_counted():
    assert Candidate((2, 6, 10), "set").full_reads == 3.5 and Candidate((2, 8), "context").full_reads == 4
