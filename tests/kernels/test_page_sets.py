"""Do both implementations choose and expand pages as a plain account says?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lim_kernels import choose_pages, expand_pages
from support.gate_oracle import chosen_blocks

EXAMPLES = {"reference": 60, "triton": 12}


def drawn_rows(lens, page, generator, device):
    """int32 slots of rows whose tokens fill pages, out of order; what lies beyond a row's length is no slot."""
    counts = [-(-length // page) for length in lens]
    order = (torch.randperm(sum(counts), generator=generator) + 1).split(counts)
    slots = torch.full((len(lens), -(-max(lens) // 16) * 16), -(1 << 20), dtype=torch.int32)
    for row, length in enumerate(lens):
        slots[row, :length] = (order[row].unsqueeze(1) * page + torch.arange(page)).flatten()[:length].int()
    return slots.to(device)


def drawn_scores(lens, page, heads, levels, generator):
    """float32 scores of few different values, so that many are equal; those of last pages and beyond are poisoned."""
    width = -(-max(lens) // page)
    scores = torch.randint(-levels, levels + 1, (len(lens), heads, width), generator=generator) / 4.0
    for row, length in enumerate(lens):
        scores[row, :, (length - 1) // page :] = float("nan")
    return scores


def padded(scores, device):
    """The same scores in rows that begin at multiples of 16 elements, as operators leave them."""
    wide = torch.full((*scores.shape[:2], -(-scores.shape[2] // 16) * 16), float("nan"), device=device)
    wide[..., : scores.shape[2]] = scores.to(device)
    return wide[..., : scores.shape[2]]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_sets_are_the_best_pages_and_the_last_one(implementation, device, index):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(
        st.lists(st.integers(1, 1500), min_size=1, max_size=4),
        st.sampled_from([16, 32, 64]),
        st.sampled_from([1, 2, 5, 33]),
        st.integers(1, 3),
        st.sampled_from([None, 0.01, 0.05, 0.4]),
        st.integers(0, 99),
    )
    def check(lens, page, most, heads, threshold, seed):
        generator = torch.Generator().manual_seed(seed)
        scores = drawn_scores(lens, page, heads, 3 + seed, generator)
        seq_lens = torch.tensor(lens, dtype=index, device=device)
        how = {"page": page, "most": most, "threshold": threshold, "implementation": implementation}
        pages, counts = choose_pages(padded(scores, device), seq_lens, **how)
        assert pages.shape == (len(lens), heads, most) and counts.shape == pages.shape[:2]
        for row, length in enumerate(lens):
            for head in range(heads):
                exact = scores[row, head].double()
                expected = chosen_blocks(exact, (length - 1) // page, most, threshold)
                chosen = pages[row, head, : int(counts[row, head])].tolist()
                assert chosen == expected or near_threshold(exact[: (length - 1) // page], threshold)

    check()


def near_threshold(scores, threshold):
    """Whether a share is within rounding of the threshold, so that either set is right."""
    return threshold is not None and bool(((scores.softmax(0) - threshold).abs() < 1e-5).any())


@pytest.mark.parametrize("threshold", [None, 0.002])
def test_rows_of_more_pages_than_one_program_holds(implementation, device, monkeypatch, threshold):
    if implementation == "triton":
        from lim_kernels.page_sets import triton

        monkeypatch.setattr(triton, "MOST_HELD", 64)
    generator, lens = torch.Generator().manual_seed(1), [3000, 64, 2999, 400]
    scores = drawn_scores(lens, 16, 2, 20, generator)
    how = {"page": 16, "most": 20, "threshold": threshold, "implementation": implementation}
    pages, counts = choose_pages(padded(scores, device), torch.tensor(lens, device=device), **how)
    for row, length in enumerate(lens):
        for head in range(2):
            expected = chosen_blocks(scores[row, head].double(), (length - 1) // 16, 20, threshold)
            assert pages[row, head, : int(counts[row, head])].tolist() == expected


def test_infinite_scores_and_one_page_alone(implementation, device):
    scores = torch.tensor([[[-math.inf, 0.0, -math.inf, 5.0, math.nan]]], device=device)
    lens, how = torch.tensor([70], device=device), {"page": 16, "implementation": implementation}
    for most, expected in ((1, [4]), (2, [3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])):
        pages, counts = choose_pages(scores, lens, most=most, **how)
        assert pages[0, 0, : int(counts[0, 0])].tolist() == expected


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_a_set_has_its_pages_tokens_in_order(implementation, device, index):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(
        st.lists(st.integers(1, 900), min_size=1, max_size=4),
        st.sampled_from([16, 64]),
        st.sampled_from([1, 2, 5, 33]),
        st.integers(1, 3),
        st.integers(0, 9),
    )
    def check(lens, page, most, heads, seed):
        generator = torch.Generator().manual_seed(seed)
        slots = drawn_rows(lens, page, generator, device)
        pages = torch.full((len(lens), heads, most), -1, dtype=torch.int32)
        counts, expected = torch.zeros(len(lens), heads, dtype=torch.int32), {}
        for row, length in enumerate(lens):
            in_row = -(-length // page)
            for head in range(heads):
                # Sets of different heads may have different sizes.
                wanted = int(torch.randint(0, most, (1,), generator=generator))
                others = torch.randperm(in_row - 1, generator=generator)[:wanted].sort().values.tolist()
                chosen = [*others, in_row - 1]
                pages[row, head, : len(chosen)] = torch.tensor(chosen)
                counts[row, head] = len(chosen)
                expected[row, head] = [t for one in chosen for t in range(one * page, (one + 1) * page)]
        seq_lens, how = torch.tensor(lens, dtype=index, device=device), {"implementation": implementation}
        sets, tokens = expand_pages(pages.to(device), counts.to(device), slots, seq_lens, page=page, **how)
        assert sets.shape == (len(lens), heads, most * page) and tokens.dtype == torch.int32
        for (row, head), positions in expected.items():
            held = [int(slots[row, t]) for t in positions if t < lens[row]]
            assert int(tokens[row, head]) == len(held)
            assert sets[row, head].tolist() == held + [0] * (most * page - len(held))

    check()


class Launches(TorchDispatchMode):
    """Records what torch computes; room for results is no launch, nor is the poison that tests put there."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.fill_):
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_set_is_chosen_by_one_launch(device, triton_runs, monkeypatch):
    """What it needs of the rows' lengths is computed where it is needed: a step has dozens of layers that choose."""
    from lim_kernels.page_sets import triton

    class Recorded:
        def __getitem__(self, grid):
            return lambda **operands: launches.made.append("choose_pages_kernel")

    monkeypatch.setattr(triton, "choose_pages_kernel", Recorded())
    scores, lens = torch.zeros(2, 3, 40, device=device), torch.tensor([640, 500], device=device)
    with Launches() as launches:
        triton.choose_pages(scores, lens, page=16, most=8, threshold=None)
    assert launches.made == ["choose_pages_kernel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(2, 4)}, r"scores float32 \[B, H_kv, P\]"),
        ({"scores": torch.ones(2, 1, 4).double()}, r"scores float32"),
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens int32 or int64 \[2\]"),
        ({"most": 0}, "page and most of 1 or more"),
        ({"threshold": 1.0}, "a threshold between 0 and 1"),
    ],
)
def test_bad_choices_are_named(change, message):
    call = {"scores": torch.ones(2, 1, 4), "seq_lens": torch.ones(2, dtype=torch.int32), "page": 16, "most": 2}
    with pytest.raises(ValueError, match=message):
        choose_pages(**{**call, **change})


def test_bad_sets_are_named():
    slots, lens = torch.ones(2, 9, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    pages, counts = torch.ones(2, 1, 4, dtype=torch.int32), torch.ones(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"pages int32 \[B, H_kv, P\]"):
        expand_pages(pages[0], counts, slots, lens, page=16)
    with pytest.raises(ValueError, match=r"counts int32 \[2, 1\]"):
        expand_pages(pages, counts[0], slots, lens, page=16)
    with pytest.raises(ValueError, match=r"slots int32 \[2, L\]"):
        expand_pages(pages, counts, slots[:1], lens, page=16)
