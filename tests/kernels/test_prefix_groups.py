"""Are groups exactly what rows share, whatever the tree, and is every position of a row read once?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import find_prefix_groups
from lim_kernels.prefix_groups import MAX_LEVELS
from prefix_rows import prefix_rows, shared_by_comparison
from support.prefix_tree import check_tree, groups_of, members_of

EXAMPLES = {"reference": 300, "triton": 40}


def find(slots, seq_lens, granule, implementation, device):
    groups = find_prefix_groups(slots.to(device), seq_lens.to(device), granule=granule, implementation=implementation)
    return {name: field.cpu() for name, field in vars(groups).items()}


@pytest.mark.parametrize("granule", [1, 4])
def test_groups_are_the_shared_part_of_the_prefix_tree(implementation, device, granule):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(
        st.integers(1, 18), st.integers(1, 70), st.sampled_from([2, 5, 12]), st.integers(1, 3), st.integers(0, 2**31)
    )
    def check(batch, width, segment, alphabet, seed):
        slots, seq_lens = prefix_rows(batch, width, segment=segment, seed=seed, alphabet=alphabet)
        found = find(slots, seq_lens, granule, implementation, device)
        check_tree(found, shared_by_comparison(slots, seq_lens, granule))

    check()


def test_two_levels_by_hand(implementation, device):
    # Eight rows: 40 tokens in common, two branches of 24 more for rows 0-3 and 4-7, and a row that shares nothing.
    slots = torch.arange(1, 101, dtype=torch.int32).repeat(9, 1)
    slots[4:8, 40:] += 1000
    slots[8] += 9000
    for row in range(9):
        slots[row, 64:] += 10_000 * (row + 1)
    seq_lens = torch.tensor([70, 66, 100, 80, 90, 65, 70, 71, 100])
    found = find(slots, seq_lens, 8, implementation, device)
    assert found["own_starts"].tolist() == [64] * 8 + [0]
    assert found["already_read"].tolist() == [0, 64, 64, 64, 40, 64, 64, 64, 0]
    assert [groups_of(found, row) for row in (0, 3, 4, 7, 8)] == [[1, 4], [1, 4], [5, 4], [5, 4], []]
    assert members_of(found, 4) == list(range(8)) and members_of(found, 5) == [4, 5, 6, 7]
    assert (found["starts"][[4, 1, 5]].tolist(), found["ends"][[4, 1, 5]].tolist()) == ([0, 40, 40], [40, 64, 64])


def test_padded_rows_of_a_graph_are_never_grouped(implementation, device):
    slots = torch.zeros(5, 40, dtype=torch.int32)
    slots[0], slots[1] = torch.arange(1, 41), torch.arange(1, 41)
    found = find(slots, torch.tensor([40, 39, 1, 1, 1]), 1, implementation, device)
    assert found["own_starts"].tolist() == [38, 38, 0, 0, 0]
    # Even where a padded row is as long as others.
    found = find(slots, torch.tensor([40, 39, 30, 30, 30]), 1, implementation, device)
    assert found["own_starts"].tolist() == [38, 38, 0, 0, 0]


def test_deeper_levels_than_are_kept_fall_to_the_rows(implementation, device):
    # Row i leaves row 0 after 8 (i + 1) tokens.
    slots = torch.arange(1, 101, dtype=torch.int32).repeat(9, 1)
    for row in range(1, 9):
        slots[row, 8 * row :] += 1000 * row
    seq_lens = torch.full((9,), 100)
    found = find(slots, seq_lens, 8, implementation, device)
    check_tree(found, shared_by_comparison(slots, seq_lens, 8))
    assert found["own_starts"].tolist() == [8 * min(MAX_LEVELS, max(row, 1) if row else 9) for row in range(9)]


def test_a_prefix_shorter_than_a_granule_is_no_group(implementation, device):
    slots = torch.arange(1, 101, dtype=torch.int32).repeat(2, 1)
    slots[1, 15:] += 1000
    found = find(slots, torch.tensor([100, 100]), 16, implementation, device)
    assert found["counts"].tolist() == [0, 0] and found["own_starts"].tolist() == [0, 0]


def test_groups_leave_rows_apart_out_and_count_from_behind_the_room(implementation, device):
    slots = torch.arange(1, 65, dtype=torch.int32, device=device).repeat(5, 1)
    slots[:, 40:] += 100 * torch.arange(5, device=device).unsqueeze(1).int()
    lens = torch.tensor([60, 58, 50, 64, 1], device=device)
    uses_set = torch.tensor([0, 1, 0, 0, 0], dtype=torch.uint8, device=device)
    how = {"granule": 8, "implementation": implementation}
    found = find_prefix_groups(slots, lens, set_columns=16, uses_set=uses_set, **how)
    alone = find_prefix_groups(slots, lens.where(uses_set == 0, 1), **how)
    assert found.own_starts.tolist() == [56, 0, 56, 56, 16]
    assert torch.equal(found.starts, alone.starts + 16) and torch.equal(found.ends, alone.ends + 16)
    for name in ("counts", "parents", "innermost", "already_read"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
    none = find_prefix_groups(slots, lens, granule=65, set_columns=16, uses_set=uses_set, implementation=implementation)
    assert none.own_starts.tolist() == [16, 0, 16, 16, 16] and not none.counts.any()


def test_many_long_rows(implementation, device, native):
    slots = torch.randperm(300 * 9000, dtype=torch.int32).view(300, 9000) + 1
    slots[:250, :8000] = slots[0, :8000]
    seq_lens = torch.randint(8100, 9000, (300,))
    found = find(slots, seq_lens, 128, implementation, device)
    assert found["own_starts"].tolist() == [8000 // 128 * 128] * 250 + [0] * 50
    assert members_of(found, 1) == list(range(250))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(2, 9, dtype=torch.int64)}, "slots int32"),
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens \[2\]"),
        ({"granule": 0}, "granule of at least 1"),
        ({"uses_set": torch.zeros(2, dtype=torch.bool)}, r"uses_set uint8 \[2\]"),
        ({"implementation": "cuda"}, "implementation among"),
    ],
)
def test_bad_operands_are_named(change, message):
    call = {"slots": torch.ones(2, 9, dtype=torch.int32), "seq_lens": torch.ones(2, dtype=torch.int32), "granule": 4}
    with pytest.raises(ValueError, match=message):
        find_prefix_groups(**{**call, **change})
