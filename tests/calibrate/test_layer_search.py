"""The search for selection layers against trying them all."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_lim.calibrate.search import best_layers, measure


def covered(recall, layers, weighted=True):
    """Mean over the sparse layers, exactly, by the definition: each counts once for every layer from it on, or once."""
    shares = []
    for j in range(layers[0], len(recall)):
        if j not in layers:
            share = Fraction(recall[max(i for i in layers if i < j)][j])
            shares += [share] * (len(recall) - j if weighted else 1)
    return sum(shares) / len(shares) if shares else None


def best_by_trying(recall, selections, max_dense):
    found = []
    for layers in itertools.combinations(range(len(recall)), selections):
        mean = covered(recall, layers)
        if mean is not None and layers[0] <= max_dense:
            found.append((-mean, layers))
    # Of equals the smallest tuple has the fewest dense layers, and then the earliest layers.
    return min(found)[1]


@st.composite
def cases(draw):
    depth = draw(st.integers(2, 8))
    # Few values make ties, two the most; floats make sums that depend on their order.
    share = draw(
        st.sampled_from([st.sampled_from([0.1, 0.3]), st.sampled_from([0.0, 0.1, 0.2, 1.0]) | st.floats(0, 1)])
    )
    recall = [[draw(share) for _ in range(depth)] for _ in range(depth)]
    return recall, draw(st.integers(1, depth - 1)), draw(st.integers(0, depth))


@given(cases())
def test_no_choice_covers_more(case):
    recall, selections, max_dense = case
    best = best_layers(recall, selections=selections, max_dense=max_dense)
    assert best.selection_layers == best_by_trying(recall, selections, max_dense)
    assert best.weighted_coverage == float(covered(recall, best.selection_layers))
    assert best.coverage == float(covered(recall, best.selection_layers, weighted=False))


def test_an_early_layer_counts_for_all_that_follow():
    recall = [[0.0, 0.875, 0.25, 0.0], [0.0, 0.0, 0.75, 0.75], [0.0, 0.0, 0.0, 0.5], [0.0] * 4]
    one, other = (measure(recall, layers) for layers in ((0, 1), (0, 2)))
    assert (one.coverage, one.weighted_coverage) == (0.75, 0.75)
    assert (other.coverage, other.weighted_coverage) == (0.6875, 0.78125)
    assert best_layers(recall, selections=2, max_dense=0) == other


def test_equal_choices_go_to_fewer_dense_then_earlier_layers():
    flat = [[0.1] * 6 for _ in range(6)]
    assert best_layers(flat, selections=3, max_dense=2).selection_layers == (0, 1, 2)


def test_dense_layers_are_not_chosen_beyond_the_limit():
    recall = [[0.0] * 6 for _ in range(6)]
    recall[3] = [1.0] * 6
    assert best_layers(recall, selections=1, max_dense=3).selection_layers == (3,)
    assert best_layers(recall, selections=1, max_dense=2).selection_layers == (0,)
    assert best_layers(recall, selections=2, max_dense=2).selection_layers == (2, 3)


def test_what_is_covered_least_is_named():
    recall = [[0.9, 0.9, 0.4, 0.8], [0.0] * 4, [0.0, 0.0, 1.0, 0.6], [0.0] * 4]
    choice = measure(recall, (0, 2))
    assert (choice.coverage, choice.lowest, choice.lowest_layer) == (0.75, 0.6, 3)
    assert choice.weighted_coverage == float((3 * Fraction(0.9) + Fraction(0.6)) / 4)


@pytest.mark.parametrize(("selections", "max_dense"), [(0, 2), (4, 2), (9, 0), (1, -1)])
def test_what_leaves_no_sparse_layer_is_refused(selections, max_dense):
    with pytest.raises(ValueError, match="sparse layer"):
        best_layers([[0.5] * 4 for _ in range(4)], selections=selections, max_dense=max_dense)


@pytest.mark.parametrize("layers", [(3,), (2, 1), (1, 1), (0, 1, 2, 3), (0, 4), (-1, 2)])
def test_layers_that_read_nothing_are_not_measured(layers):
    with pytest.raises(ValueError, match="no sparse layer"):
        measure([[0.5] * 4 for _ in range(4)], layers)
