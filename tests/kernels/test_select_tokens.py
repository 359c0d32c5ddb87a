"""Is token selection the paper's rule, with every implementation?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import SetSizes, choose_tokens, score_tokens, select_tokens
from oracle import aggregate_scores, union_set

# Triton's interpreter is slow, and on a GPU every combination of sizes is compiled.
EXAMPLES = {"reference": 400, "triton": 25}
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=4)


@st.composite
def selections(draw):
    """Random shapes with few distinct logits (many ties) or none."""
    lengths = draw(LENGTHS)
    heads = draw(st.integers(1, 5))
    budget = draw(st.integers(1, 40))
    sinks = draw(st.integers(0, budget))
    recent = draw(st.integers(0, budget - sinks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = max(lengths) + draw(st.integers(0, 3))
    logits = torch.randn(len(lengths), heads, width, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()
    # Whatever lies beyond a row's length must not matter.
    for row, length in enumerate(lengths):
        logits[row, :, length:] = float("nan")
    return logits, torch.tensor(lengths, dtype=torch.int32), {"budget": budget, "recent": recent, "sinks": sinks}


def test_union_is_the_rank_major_union(implementation, device):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(selections())
    def check(case):
        logits, seq_lens, sizes = case
        positions, counts = select_tokens(
            logits.to(device), seq_lens.to(device), **sizes, implementation=implementation
        )
        assert positions.dtype == torch.int32 and positions.shape == (len(seq_lens), sizes["budget"])
        for row, length in enumerate(seq_lens.tolist()):
            count = counts[row].item()
            assert count == min(length, sizes["budget"])
            assert positions[row, :count].tolist() == union_set(logits[row], length, **sizes)
            assert (positions[row, count:] == -1).all()

    check()


@pytest.mark.parametrize("how", ["max", "sum"])
def test_softmax_aggregates_keep_the_heaviest_candidates(implementation, device, how):
    @settings(max_examples=EXAMPLES[implementation] // 2, deadline=None)
    @given(selections())
    def check(case):
        logits, seq_lens, sizes = case
        positions, counts = select_tokens(
            logits.to(device), seq_lens.to(device), aggregate=how, **sizes, implementation=implementation
        )
        for row, length in enumerate(seq_lens.tolist()):
            kept = positions[row, : counts[row]].tolist()
            assert_heaviest(kept, aggregate_scores(logits[row], length, how), **sizes)

    check()


def assert_heaviest(kept, scores, *, budget, recent, sinks):
    """`kept` are sinks, window and the best-scored candidates of a row, up to rounding of the scores."""
    length = len(scores)
    assert kept == sorted(set(kept)) and len(kept) == min(length, budget)
    if length <= budget:
        assert kept == list(range(length))
        return
    forced = {*range(sinks), *range(length - recent, length)}
    assert forced <= set(kept)
    # Free slots are compared by score: a token left out is no heavier than one kept.
    free = [scores[t] for t in kept if t not in forced]
    left = [scores[t] for t in range(sinks, length - recent) if t not in kept]
    assert not free or not left or min(free) >= max(left) - 1e-6 * max(scores)


def test_all_heads_alike_gives_one_head_s_top_tokens(implementation, device):
    logits = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)).expand(1, 8, 64).contiguous().to(device)
    seq_lens = torch.tensor([64], device=device)
    positions, _ = select_tokens(logits, seq_lens, budget=16, recent=4, sinks=2, implementation=implementation)
    middle = logits[0, 0, 2:60].topk(10).indices + 2
    assert positions[0].tolist() == sorted([0, 1, *middle.tolist(), 60, 61, 62, 63])


@pytest.mark.parametrize("aggregate", ["union", "max", "sum"])
def test_equal_logits_go_to_the_lower_position_on_every_path(implementation, device, aggregate):
    logits, seq_lens = torch.zeros(1, 4, 50, device=device), torch.tensor([50], device=device)
    sizes = {"budget": 10, "recent": 3, "sinks": 1}
    positions, _ = select_tokens(logits, seq_lens, **sizes, aggregate=aggregate, implementation=implementation)
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 47, 48, 49]


@pytest.mark.parametrize("aggregate", ["union", "max", "sum"])
def test_heads_split_over_ranks_choose_the_same_set(implementation, device, aggregate):
    logits = torch.randn(3, 8, 200, generator=torch.Generator().manual_seed(1)).to(device)
    seq_lens = torch.tensor([200, 150, 20], device=device)
    sizes = SetSizes(32, recent=8, sinks=4)
    how = {"aggregate": aggregate, "implementation": implementation}
    shares = [
        score_tokens(logits[:, first : first + 2], seq_lens, sizes, first_head=first, num_heads=8, **how)
        for first in (0, 2, 4, 6)
    ]
    stacked = torch.stack(shares)
    combined = stacked.logsumexp(0) if aggregate == "sum" else stacked.amax(0)
    expected, _ = select_tokens(logits, seq_lens, **how, **vars(sizes))
    assert torch.equal(choose_tokens(combined, seq_lens, sizes, implementation=implementation)[0], expected)


def test_a_place_far_ahead_does_not_outweigh_a_score():
    # Position and score share an integer, which has to have room for the longest row.
    scores = torch.full((1, (1 << 22) - 1), -3.0)
    scores[0, 0], scores[0, -1] = 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    sizes, seq_lens = SetSizes(1, recent=0, sinks=0), torch.tensor([scores.shape[1]])
    assert choose_tokens(scores, seq_lens, sizes, implementation="reference")[0].item() == scores.shape[1] - 1


def test_negative_zero_ties_with_zero(implementation, device):
    logits = torch.tensor([[[0.0, -0.0, 0.0, -0.0, 1.0, 2.0]]], device=device)
    seq_lens = torch.tensor([6], device=device)
    positions, _ = select_tokens(logits, seq_lens, budget=4, recent=1, sinks=0, implementation=implementation)
    assert positions[0].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 9, 3).transpose(1, 2)}, "contiguous"),
        ({"seq_lens": torch.ones(2, 2, dtype=torch.int32)[:, 0]}, "contiguous"),
        ({"logits": torch.zeros(2, 3)}, r"logits float32 \[B, H, L\]"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.float64)}, "float32"),
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens integer \[2\]"),
        ({"budget": 4}, r"budget >= recent \+ sinks"),
        ({"sinks": -1}, "none negative"),
        ({"aggregate": "mean"}, "aggregate in"),
        ({"implementation": "cuda"}, "implementation among reference"),
    ],
    ids=[
        "logits-strides",
        "lens-strides",
        "rank",
        "dtype",
        "rows",
        "budget",
        "negative",
        "aggregate",
        "implementation",
    ],
)
def test_bad_operands_are_named(change, message):
    call = {
        "logits": torch.zeros(2, 3, 9),
        "seq_lens": torch.tensor([9, 5], dtype=torch.int32),
        "budget": 6,
        "recent": 3,
        "sinks": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        select_tokens(call.pop("logits"), call.pop("seq_lens"), **call)
