"""Does a row with a budget and window of its own choose what it would choose with these sizes for all?"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import SetSizes, choose_tokens
from test_select_tokens_triton import NONE, SCORES

EXAMPLES = {"reference": 300, "triton": 25}


@st.composite
def rows_of_own_sizes(draw):
    """Scores, lengths, common sizes, and a budget and a window for each row."""
    lens = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
    sinks = draw(st.integers(0, 6))
    budget = sinks + draw(st.integers(1, 200))
    budgets = [draw(st.integers(sinks + 1, budget)) for _ in lens]
    recents = [draw(st.integers(0, own - sinks)) for own in budgets]
    noise = torch.randn(len(lens), max(lens), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return SCORES[draw(st.sampled_from(sorted(SCORES)))](noise), lens, budget, sinks, budgets, recents


def test_a_row_chooses_as_if_its_sizes_were_everybody_s(implementation, device):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(rows_of_own_sizes())
    def check(case):
        scores, lens, budget, sinks, budgets, recents = case
        positions = torch.arange(scores.shape[1])
        for row, (length, own, recent) in enumerate(zip(lens, budgets, recents, strict=True)):
            candidates = (positions >= sinks) & (positions < length - recent)
            scores[row, ~candidates if length > own else slice(None)] = NONE
        scores = scores.to(device)
        sets, counts = choose_tokens(
            scores,
            torch.tensor(lens, dtype=torch.int32, device=device),
            SetSizes(budget, recent=budget + 1, sinks=sinks),
            budgets=torch.tensor(budgets, dtype=torch.int32, device=device),
            recents=torch.tensor(recents, dtype=torch.int32, device=device),
            implementation=implementation,
        )
        assert sets.shape == (len(lens), budget) and counts.tolist() == list(map(min, lens, budgets))
        for row, (length, own, recent) in enumerate(zip(lens, budgets, recents, strict=True)):
            alone = torch.tensor([length], device=device)
            expected, _ = choose_tokens(
                scores[row : row + 1], alone, SetSizes(own, recent, sinks), implementation="reference"
            )
            assert sets[row, :own].tolist() == expected[0].tolist()
            assert (sets[row, own:] == -1).all()

    check()


@pytest.mark.parametrize("given", ["budgets", "recents"])
def test_one_of_both_leaves_the_other_to_the_batch(implementation, device, given):
    scores = torch.randn(3, 2500, generator=torch.Generator().manual_seed(5)).to(device)
    seq_lens = torch.tensor([2500, 40, 31], dtype=torch.int32, device=device)
    sizes = SetSizes(64, recent=9, sinks=2)
    own = {"budgets": 30, "recents": 17}[given]
    slots = torch.randint(1, 1 << 30, scores.shape, dtype=torch.int32, device=device)
    results = choose_tokens(
        scores,
        seq_lens,
        sizes,
        **{given: torch.full((3,), own, dtype=torch.int32, device=device)},
        slots=slots,
        implementation=implementation,
    )
    alike = replace(sizes, **{given[:-1]: own})
    sets, counts = choose_tokens(scores, seq_lens, alike, slots=slots, implementation="reference")
    assert torch.equal(results[0][:, : alike.budget], sets) and torch.equal(results[1], counts)
    assert (results[0][:, alike.budget :] == 0).all()


@pytest.mark.parametrize("name", ["budgets", "recents"])
@pytest.mark.parametrize(
    "wrong",
    [torch.ones(2, dtype=torch.int64), torch.ones(3, dtype=torch.int32), torch.ones(2, 2, dtype=torch.int32)[:, 0]],
    ids=["dtype", "rows", "strides"],
)
def test_bad_sizes_are_named(name, wrong):
    with pytest.raises(ValueError, match=rf"{name} int32 \[2\]|contiguous"):
        choose_tokens(
            torch.zeros(2, 9), torch.tensor([9, 5], dtype=torch.int32), SetSizes(6, recent=3, sinks=2), **{name: wrong}
        )
