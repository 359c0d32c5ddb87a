"""Layer plans and budgets of the methods, and presets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgl_lim.methods import Role
from sgl_lim.settings.presets import PRESETS, find_preset
from support.driven_layers import build_method

D, S, P, Q = Role.DENSE, Role.SELECT, Role.SPARSE, Role.OWN


def build(name="lessismore", budget=64, recency=0.25, sinks=4, layers=(2, 4), aggregate="union"):
    values = {"budget": budget, "recency": recency, "sinks": sinks, "aggregate": aggregate}
    return build_method(name, **values, selection_layers=layers)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("lessismore", (D, D, S, P, S, P)),
        ("window", (D, D, P, P, P, P)),
        ("full", (D,) * 6),
        ("quest", (D, D, Q, Q, Q, Q)),
        ("seerattention", (Q,) * 6),
    ],
)
def test_layer_plan(name, plan):
    assert build(name).layer_roles(6) == plan


def test_selection_may_begin_at_layer_zero():
    assert build(layers=(0, 3)).layer_roles(4) == (S, P, P, S)


@pytest.mark.parametrize(
    ("budget", "recency", "sinks", "middle", "recent", "kept_sinks"),
    [
        (2048, 0.25, 4, 1536, 508, 4),
        (64, 0.25, 4, 48, 12, 4),
        (10, 0.1, 4, 9, 1, 0),  # the recency share does not cover the sinks: none are kept
        (100, 0.29, 4, 71, 25, 4),  # 100 * (1 - 0.29) is 70.999… in binary
        (16, 1.0, 4, 0, 12, 4),
        (16, 0.0, 4, 16, 0, 0),
    ],
)
def test_budget_split(budget, recency, sinks, middle, recent, kept_sinks):
    sizes = build(budget=budget, recency=recency, sinks=sinks).sizes
    assert (sizes.middle, sizes.recent, sizes.sinks) == (middle, recent, kept_sinks)


@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 20))
def test_budget_split_always_adds_up(budget, recency, sinks):
    sizes = build(budget=budget, recency=recency, sinks=sinks).sizes
    assert sizes.middle + sizes.recent + sizes.sinks == budget
    assert min(sizes.middle, sizes.recent, sizes.sinks) >= 0


def test_window_set_is_sinks_and_recent_tokens():
    seq_lens = torch.tensor([20, 8, 3])
    positions, counts = build("window", budget=8, sinks=2).initial_set(seq_lens, 20)
    assert positions.tolist() == [
        [0, 1, 14, 15, 16, 17, 18, 19],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, -1, -1, -1, -1, -1],
    ]
    assert counts.tolist() == [8, 8, 3]


def test_a_window_s_set_is_no_wider_than_the_rows_are():
    positions, counts = build("window", budget=1 << 50).initial_set(torch.tensor([3, 2]), 3)
    assert positions.tolist() == [[0, 1, 2], [0, 1, -1]] and counts.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("path", "depth", "layers"),
    [
        ("Qwen/Qwen3-8B", 36, (2, 12)),
        ("/models/qwen3_4b/", 36, (2, 20)),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 32, (2, 13)),
        ("/runs/qwen3-8b-baselines/Qwen3-4B", 36, (2, 20)),
        ("/hub/models--Qwen--Qwen3-8B/snapshots/b968826d", 36, (2, 12)),
    ],
)
def test_presets_by_name(path, depth, layers):
    assert find_preset(path, depth).selection_layers == layers


def test_a_preset_needs_the_model_s_depth():
    assert find_preset("my-qwen3-8b-pruned", 30) is None


def test_presets_are_possible():
    for preset in PRESETS:
        layers = preset.selection_layers
        assert list(layers) == sorted(set(layers)) and layers[-1] < preset.num_layers
